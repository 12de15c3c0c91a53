"""Networks for segmentation as they are deployed: fused, and exported for images of any size."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import openvino
import pytest
import torch
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo
from qtvit.deploy import fuse
from qtvit.deploy.artifact import FORMATS, OUTPUT, Artifact
from qtvit.deploy.formats import write
from qtvit.deploy.parity import Case
from qtvit.deploy.runtimes import OPENVINO_CONFIG, open_exported
from qtvit.tasks.segment.model import HEADS, build_segmenter

Randomize = Callable[[nn.Module, int], nn.Module]
SIZES = [(32, 32), (37, 61), (48, 20)]


@pytest.fixture
def make(tiny: None, randomize: Randomize) -> Callable[[str], nn.Module]:
    """A small network with random BatchNorm statistics, in evaluation mode."""
    return lambda head: randomize(build_segmenter("qtvit_nano", num_classes=6, head=head, channels=8), 0).eval()


def pixels(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_same(run: Callable[[Tensor], Tensor], network: nn.Module) -> None:
    """At several sizes and batches."""
    for batch, size in enumerate(SIZES, start=1):
        with torch.no_grad():
            want, got = network(pixels(*size, batch=batch)), run(pixels(*size, batch=batch))
        assert got.shape == (batch, 6, *size)
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
        assert float((got.argmax(1) == want.argmax(1)).float().mean()) >= 0.999


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_fused_outputs_are_the_same(make: Callable[[str], nn.Module], head: str) -> None:
    network = make(head)
    for size in SIZES:
        want = network(pixels(*size))
        for fused in (fuse(network), fuse(network, size)):
            torch.testing.assert_close(fused(pixels(*size)), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
            assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())


@pytest.mark.parametrize(("format", "head"), [("onnx", "upernet"), ("onnx", "light_skip"), ("torch", "light")])
def test_exported_for_any_size(make: Callable[[str], nn.Module], format: str, head: str, tmp_path: Path) -> None:
    """Also in OpenVINO, whose files are made of ONNX."""
    info = ModelInfo("qtvit_nano", {}, [f"class {i}" for i in range(6)], {"size": [32, 32]}, task="segment")
    network, path = make(head), tmp_path / f"model{FORMATS[format]}"
    write(fuse(network), Artifact(info, format, "fp32", ("batch", "hw")), path)
    with contextlib.closing(open_exported(path, "cpu")) as exported:
        assert_same(exported, network)
    if format == "onnx":
        compiled = openvino.compile_model(openvino.convert_model(path), "CPU", OPENVINO_CONFIG)
        assert_same(lambda images: torch.from_numpy(compiled(images.numpy())[OUTPUT]), network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_halves(make: Callable[[str], nn.Module], head: str, dtype: torch.dtype) -> None:
    network = make(head)
    half = fuse(network).to(dtype)
    for size in SIZES:
        want, got = network(pixels(*size)), half(pixels(*size).to(dtype)).float()
        assert float((got - want).norm() / want.norm()) < (0.01 if dtype == torch.float16 else 0.1)


def test_pixels_are_compared_one_by_one() -> None:
    """Of the four pixels, one is a tie and one gets another class."""
    expected = torch.tensor([[[1.0, 5.0], [3.0, 0.0]], [[1.0, 0.0], [0.0, 9.0]]]).unsqueeze(0)
    found = expected.clone()
    found[0, :, 0, 1] = torch.tensor([0.0, 4.0])
    case = Case.compare((2, 2), 1, expected, found)
    assert (case.num_images, case.num_clear, case.num_agreeing, case.max_diff) == (1, 3, 2, 5.0)
