import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qtvit.bench.memory import peak_memory
from qtvit.bench.peak import matmul_peaks
from qtvit.bench.runtimes import RUNTIMES, check_runtimes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """(B, 3, H, W) -> (B, 5)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


WAYS = [(name, precision) for name, runtime in RUNTIMES.items() for precision in runtime.precisions]


@pytest.mark.parametrize(
    ("name", "precision"),
    [way for way in WAYS if not way[0].startswith("compile") or way == ("compile_frozen", "fp32")],
)
def test_outputs_are_those_of_pytorch(name: str, precision: str, tmp_path: Path) -> None:
    for package in RUNTIMES[name].packages:
        pytest.importorskip(package)
    model, images = Tiny().eval(), torch.randn(2, 3, 8, 12)
    path = tmp_path / f"model{RUNTIMES[name].suffix}"
    RUNTIMES[name].save(model, images, path, precision)
    assert path.is_file()
    try:
        run = RUNTIMES[name].open(path, images, precision)
    except ValueError as error:
        pytest.skip(str(error))  # OpenVINO on a CPU without that precision
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}[precision]
    for _ in range(2):
        torch.testing.assert_close(run().float(), model(images), rtol=0, atol=tolerance)
    assert model.conv.weight.dtype == torch.float32
    assert (run().float() - model(images)).abs().max() > 0 or precision == "fp32"  # half precision it is


@pytest.mark.parametrize(
    ("names", "precisions", "device", "message"),
    [
        (["eagre"], ["fp32"], CPU, "unknown runtime 'eagre'; did you mean eager"),
        (["eager"], ["fp64"], CPU, "unknown precision 'fp64'; did you mean"),
        (["onnxruntime"], ["bf16"], CPU, "onnxruntime has no bf16: .*openvino have"),
        (["openvino"], ["fp32"], torch.device("cuda"), "openvino is measured on cpu alone, not on cuda"),
    ],
)
def test_what_there_is_not(names: list[str], precisions: list[str], device: torch.device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_runtimes(names, precisions, device)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match="openvino"):
        check_runtimes(["eager", "openvino"], ["fp32"], CPU)


@pytest.mark.parametrize(("speeds", "tried"), [([5.0, 40.0, 20.0], [1, 2, 3]), ([5.0, 0.5, 20.0], [1, 2])])
def test_peaks_are_the_best_of_all(speeds: list[float], tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([6e-9 * side**3 / speed for side, speed in zip((1, 2, 3), speeds, strict=True)])
    monkeypatch.setattr("qtvit.bench.peak._fastest", lambda run, device: next(seconds))
    found = matmul_peaks(("channels_last",), "fp32", CPU, sizes=(1, 2, 3))
    assert list(found["all"]) == ["eager"]
    assert found["all"]["eager"] == pytest.approx(dict(zip(tried, speeds, strict=False)))  # none after a hopeless one
    assert found["gflops"] == pytest.approx(max(speeds[: len(tried)]))
    assert found["size"] == (2 if speeds[1] > 1 else 1)
    assert found["runtime"] == "eager"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_products_are_timed(precision: str) -> None:
    found = matmul_peaks(("eager",), precision, CPU, sizes=(16,))
    assert found["gflops"] == found["all"]["eager"][16] > 0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says how large a process is")
def test_memory_is_that_of_weights_and_activations(tmp_path: Path) -> None:
    images, path = torch.randn(1, 3, 8, 8), tmp_path / "model.pt"
    RUNTIMES["eager"].save(nn.Sequential(nn.Linear(8, 1_000_000, bias=False), nn.ReLU()), images, path, "fp32")
    large = peak_memory(path, "eager", "fp32", (1, 3, 8, 8))
    assert large is not None
    assert 32e6 + 96e6 < large < 32e6 + 2 * 2 * 96e6  # weights; (1, 3, 8, 1,000,000) before and after the activation


def test_memory_of_a_compiler_is_not_measured(tmp_path: Path) -> None:
    assert peak_memory(tmp_path / "none", "compile", "fp32", (1, 3, 8, 8)) is None


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says how large a process is")
def test_a_child_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory of eager cannot be measured: .*none"):
        peak_memory(tmp_path / "none", "eager", "fp32", (1, 3, 8, 8))
