"""What tests of the training steps share: a configuration, batches, and Lightning's loop around a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from qtvit.tasks.classify.config import AugmentConfig, ClassifyConfig, ClassifyEma, ClassifyOptim
from qtvit.training.run import build_trainer
from qtvit.training.task import Task

NUM_CLASSES = 5
Batch = tuple[Tensor, Tensor]


def configured(
    optim: dict[str, Any] | None = None,
    augment: dict[str, Any] | None = None,
    ema: dict[str, Any] | None = None,
    **options: Any,
) -> ClassifyConfig:
    """A short training; ``optim``, ``augment`` and ``ema`` are the options of these parts."""
    parts = {
        "optim": ClassifyOptim(**(optim or {})),
        "augment": AugmentConfig(**(augment or {})),
        "ema": ClassifyEma(**(ema or {})),
    }
    return ClassifyConfig(**{"data": "none", "epochs": 2, "num_workers": 0, **parts, **options})


def random_batches(num: int, size: int = 8, sides: Sequence[int] = (16,)) -> list[Batch]:
    """``num`` batches of ``size`` images, whose side is each of ``sides`` in turn."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for side in (sides[i % len(sides)] for i in range(num))
    ]


def fit(
    task: Task,
    batches: Sequence[Batch],
    run: Path,
    *callbacks: Callback,
    held_out: Sequence[Batch] = (),
    device: str = "cpu",
) -> lightning.Trainer:
    """Train ``task`` on these batches in every epoch, as a run does; evaluate if there is ``held_out``."""
    trainer = build_trainer(task.config, torch.device(device), run, list(callbacks))
    fit_with(trainer, task, batches, held_out)
    return trainer


def fit_with(trainer: lightning.Trainer, task: Task, batches: Sequence[Batch], held_out: Sequence[Batch] = ()) -> None:
    loaders = [DataLoader(part, batch_size=None) for part in (batches, held_out) if part]  # type: ignore[arg-type]
    trainer.fit(task, *loaders)
