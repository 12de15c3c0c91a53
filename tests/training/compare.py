"""What two runs left, compared."""

from pathlib import Path
from typing import Any

import torch

import qtvit
from qtvit.training.callbacks import LAST


def same_end(run: Path, other: Path) -> None:
    """All that training leaves is equal to the bit."""
    ours, theirs = (torch.load(folder / LAST, weights_only=True) for folder in (run, other))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        _same(ours[key], theirs[key], key)
    assert (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    best, other_best = (qtvit.load(folder) for folder in (run, other))
    assert best.info == other_best.info
    _same(best.model.state_dict(), other_best.model.state_dict(), "best")


def _same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours.keys() - {"seconds"}:
            _same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            _same(*pair, f"{where}.{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where
