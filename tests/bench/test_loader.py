import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from qtvit.bench import loader
from qtvit.bench.loader import bench_loader
from qtvit.data.sampling import seed_everywhere
from qtvit_cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, number in (("train", 5), ("val", 1)):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i}.png")
    return root


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ours_next_to_timms(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int) -> None:
    out = tmp_path / "new" / "bench.json"
    argv = (
        f"--img-size 24x32 --batch-size 3 --batches 2 --rounds 2 --device cpu --num-workers {num_workers} --json {out}"
    )
    assert main(["bench", "loader", str(folder), *argv.split(), "--output", str(tmp_path / "picture")]) == 0
    assert json.loads((tmp_path / "picture.json").read_text()) == json.loads(out.read_text())
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    result = json.loads(out.read_text())
    ours, peer = result["loaders"]["qtvit"], result["loaders"]["timm"]
    assert peer["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert len(ours["seconds"]) == len(peer["seconds"]) == 2
    assert ours["images_per_second"] == pytest.approx(6 / np.median(ours["seconds"]))
    by_round = [b / a for a, b in zip(ours["seconds"], peer["seconds"], strict=True)]
    assert ours["ratio"]["median"] == pytest.approx(np.median(by_round))
    assert result["settings"]["timm_use_prefetcher"] is False
    assert {"torch", "timm", "cpu", "threads"} <= set(result["environment"])
    printed = capsys.readouterr().out
    assert "timm_use_prefetcher False" in printed
    assert "qtvit" in printed


def test_both_deliver_the_same_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per turn: all images once or, if there are too few, in turn; normalised fp32 of the size; an epoch of its own."""
    turns: list[list[tuple[Tensor, Tensor]]] = []
    monkeypatch.setattr(loader, "_consume", lambda batches, device: turns.append(list(batches)))
    bench_loader(str(folder), img_size=(24, 32), batch_size=3, batches=5, rounds=2, device="cpu")
    assert len(turns) == 2 * 4  # two warm-up rounds
    for batches in turns:
        assert len(batches) == 5
        for images, labels in batches:
            assert images.shape == (3, 3, 24, 32)
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert images.min() < -1 < 1 < images.max()
    numbers = [torch.cat([labels for _, labels in batches]).bincount().tolist() for batches in turns]
    assert len(set(map(tuple, numbers))) == 1  # the same images for both
    ours = turns[::2]
    assert not torch.equal(ours[0][0][0], ours[1][0][0])


def test_both_augment_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders: list[Any] = []
    monkeypatch.setattr(loader, "_consume", lambda batches, device: loaders.append(batches))
    bench_loader(str(folder), img_size=(24, 32), batch_size=3, batches=2, rounds=2, device="cpu")
    ours, peer = (each.dataset for each in loaders[:2])
    results = []
    for transform in (ours.datasets[0].transform, peer.transform):
        seed_everywhere(0)
        results.append(torch.stack([transform(Image.radial_gradient("L").convert("RGB")) for _ in range(20)]))
    assert torch.equal(*results)
    assert all(isinstance(each, DataLoader) for each in loaders)  # not timm's prefetcher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounds 1", "needs two rounds"),
        ("--img-size 0", "--img-size must be a side"),
        ("--auto-augment rnd", "--augment.auto-augment 'rnd' is not one of timm's"),
        ("--num-workers=-1", "--num-workers must be 0 or more"),
        ("--device cuda:9", "no such device"),
    ],
)
def test_mistakes(folder: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", str(folder), *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("data", "message"), [("digits", "no image files"), ("nowhere", "no such folder")])
def test_data_that_timm_cannot_read(data: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", data]) == 2
    assert message in capsys.readouterr().err
