import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from qtvit.bench.measure import in_turns, paired_ratio
from qtvit.bench.train import bytes_kept
from qtvit_cli import main


def test_candidates_take_turns_in_both_orders_and_warm_up() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = in_turns(candidates, device=torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert [len(seconds) for seconds in samples.values()] == [3, 3]


def test_the_ratio_is_taken_round_by_round() -> None:
    ratio = paired_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.5, 3.0, 3.5)


def test_bytes_kept_by_hand() -> None:
    """A linear layer keeps its input, the square keeps its own; weights and a second view do not count."""
    layer = nn.Linear(8, 4)
    x = torch.randn(5, 8)
    assert bytes_kept(lambda: layer(x).square().sum(), layer) == 4 * (5 * 8 + 5 * 4)
    assert bytes_kept(lambda: (layer(x).square() + layer(x[:2]).sum()).sum(), layer) == 4 * (5 * 8 + 5 * 4)


def test_ours_next_to_the_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    argv = "bench train qtvit_0 --peer efficientvit_b0 --img-size 64x96 --batch-size 2 --rounds 2"
    argv += " --recompute-activations --json"
    assert main([*argv.split(), str(out)]) == 0
    result = json.loads(out.read_text())
    ours, peer = result["models"]["qtvit_0"], result["models"]["efficientvit_b0"]
    assert ours["bytes_kept_ratio"] == pytest.approx(ours["bytes_kept_per_image"] / peer["bytes_kept_per_image"], 1e-4)
    assert peer["step_ratio"] == {"median": 1, "low": 1, "high": 1}
    assert len(ours["step_seconds"]) == 2
    assert ours["bytes_kept_ratio"] < 0.6
    assert {"torch", "timm", "cpu", "threads"} <= set(result["environment"])
    assert "qtvit_0" in capsys.readouterr().out


def test_other_forms_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "steps"
    names = ["qtvit_nano", "qtvit_nano:softmax", "released:qtvit_nano"]
    argv = (
        f"bench train {' '.join(names)} --peer qtvit_nano:relu --img-size 32 --batch-size 2 --rounds 2 --output {out}"
    )
    assert main(argv.split()) == 0
    result = json.loads((tmp_path / "steps.json").read_text())
    assert list(result["models"]) == [*names, "qtvit_nano:relu"]
    kept = {name: row["bytes_kept_per_image"] for name, row in result["models"].items()}
    assert len(set(kept.values())) == 4
    assert kept["released:qtvit_nano"] > kept["qtvit_nano"]
    assert result["settings"]["recompute_activations"] is False
    assert result["command"] == f"qtvit {argv}"
    assert main([*argv.split(), "--recompute-activations"]) == 0
    less = json.loads((tmp_path / "steps.json").read_text())
    assert less["settings"]["recompute_activations"] is True
    assert less["models"]["qtvit_nano"]["bytes_kept_per_image"] < 0.6 * kept["qtvit_nano"]
    with Image.open(tmp_path / "steps.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("qtvit_9", "unknown model 'qtvit_9'; did you mean qtvit_6"),
        ("--peer zzz", "unknown model 'zzz'; known: "),
        ("--img-size 0", "--img-size must be a side"),
        ("qtvit_0 --img-size 16", "below the network's minimum of 32 px"),
        ("efficientvit_b0:relu", "only models of ours"),
        ("model.pt2", "model.pt2: no such file"),
        ("--rounds 1", "needs two rounds"),
        ("--device cuda:9", "no such device"),
    ],
)
def test_mistakes(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 500
