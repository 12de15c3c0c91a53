import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qtvit.bench import scaling
from qtvit.bench.scaling import attention_runs, bench_scaling, find_crossover, fit_exponent, heads_by_dim
from qtvit.ops import linear_attention_cf
from qtvit_cli import main

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]


def test_heads_are_those_of_the_last_stages() -> None:
    assert heads_by_dim() == {16: 2 * 256 // 16, 32: 2 * 384 // 32}


@pytest.mark.parametrize("kernel", ["taylor2", "relu", "softmax"])
def test_what_is_timed_is_attention(kernel: str) -> None:
    out = attention_runs([kernel], (1, 2, 16, 5), torch.device("cpu"))[kernel]()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 5, generator=generator) for _ in range(3))
    want = linear_attention_cf(q, k, v, kernel)
    torch.testing.assert_close(out, want.mT if kernel == "softmax" else want)
    assert not out.requires_grad


def test_exponents_are_those_of_the_larger_half() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    overhead = [5.0, 5.0, 5.0, *(float(size) for size in sizes[3:])]
    assert fit_exponent(sizes, overhead) == pytest.approx(1)
    assert fit_exponent([1, 10], [2, 200]) == pytest.approx(2)
    assert fit_exponent([1], [2]) is None


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 0.5, 2, 4], 20 * 20**0.5 / 10**0.5),  # halfway between 20 and 40 on logarithmic axes
        ([2, 2, 2, 2], None),
        ([0.5, 0.5, 0.5, 0.5], None),
        ([2, 2, 2, 0.5], None),
        ([2, 0.5, 2, 2], 20 * 2**0.5),
    ],
)
def test_crossovers(ratios: list[float], expected: float | None) -> None:
    found = find_crossover([10, 20, 40, 80], ratios)
    assert found == (None if expected is None else pytest.approx(expected))


def test_growth_of_attention_and_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "growth.png"
    argv = "bench scaling --model qtvit_nano --peer efficientvit_m0 --kernel taylor2,softmax --sizes 64,128,96"
    assert main([*argv.split(), *f"--head-dim 16 --rounds 2 --threads 1 --output {out}".split()]) == 0
    result = json.loads((tmp_path / "growth.json").read_text())
    curves = {(curve["part"], curve["name"]): curve for curve in result["curves"]}
    assert list(curves) == [
        ("attention, D = 16", "taylor2"),
        ("attention, D = 16", "softmax"),
        ("network, eager", "qtvit_nano:taylor2"),
        ("network, eager", "qtvit_nano:softmax"),
        ("network, eager", "efficientvit_m0"),
    ]
    for (part, _), curve in curves.items():
        sizes = [4, 9, 16, 36, 64] if part.startswith("attention") else [64**2, 96**2, 128**2]
        assert curve["sizes"] == sizes
        assert [len(seconds) for seconds in curve["seconds"]] == [2] * len(sizes)
        times = curve["median_seconds"]
        assert curve["relative_growth"][-1] == pytest.approx(times[-1] / times[0] / (sizes[-1] / sizes[0]))
        assert curve["exponent"] == pytest.approx(fit_exponent(sizes, times))
    crossovers = {(cross["part"], cross["than"]) for cross in result["crossovers"]}
    assert crossovers == {key for key in curves if not key[1].endswith("taylor2")}
    assert result["settings"]["head_dims"] == {"16": "32 heads"}
    with Image.open(out) as picture:
        assert picture.width > 1000
    printed = capsys.readouterr().out
    assert "softmax: time grows as tokens^" in printed
    assert "from 64 to 128 px, 4.0 times the pixels take" in printed


def test_parts(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_scaling(sizes=[32, 64], rounds=2, network=False, head_dims=[32], kernels=["taylor2"])
    assert [curve["part"] for curve in result["curves"]] == ["attention, D = 32"]
    result = bench_scaling("qtvit_nano", "qtvit_nano:relu", sizes=[32, 64], rounds=2, attention=False, kernels=["elu"])
    assert [curve["name"] for curve in result["curves"]] == ["qtvit_nano:elu", "qtvit_nano:relu"]


def test_what_takes_too_long_is_not_measured_at_larger_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[list[str], int]] = []
    runs = scaling.attention_runs

    def note(kernels: list[str], shape: tuple[int, ...], device: torch.device) -> object:
        made.append((list(kernels), shape[-1]))
        return runs(kernels, shape, device)

    monkeypatch.setattr(scaling, "attention_runs", note)
    result = bench_scaling(sizes=[32, 64], rounds=2, network=False, head_dims=[16], kernels=["relu"], max_seconds=0)
    assert made == [(["relu"], 1), ([], 4), ([], 16)]
    assert result["curves"][0]["sizes"] == [1]
    assert "left out: relu at more than 1 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model qtvit_9", "unknown model 'qtvit_9"),
        ("--model efficientvit_b0", "only models of ours"),
        ("--kernel sofmax", "unknown kernel 'sofmax'; did you mean softmax"),
        ("--sizes 224", "two image sizes or more, got [224]"),
        ("--sizes 16,64", "--sizes 16x16 is below the network's minimum of 32 px"),
        ("--sizes a", "--sizes must be whole numbers"),
        ("--head-dim 8", "unknown head dimension '8'; known: 16, 32"),
        ("--runtime onnxruntim", "unknown runtime 'onnxruntim'; did you mean onnxruntime"),
        ("--rounds 1", "needs two rounds"),
    ],
)
def test_mistakes(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", *options.split()]) == 2
    assert message in capsys.readouterr().err
