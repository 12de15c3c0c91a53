"""What runs of every task share: the run folder, processes and threads, the Lightning trainer and its callbacks."""

import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from qtvit.checkpoints import ModelInfo, save_model

from .config import TrainConfig

LAST = "last.ckpt"


def create_run_folder(output: str | None, default_name: str) -> Path:
    """A new folder: ``output``, or runs/``default_name`` with a number when that is taken.

    Raises:
        ValueError: ``output`` exists and is not empty.
    """
    if output is not None:
        run = Path(output)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"--output {run} exists already and is not empty; name another folder")
        run.mkdir(parents=True, exist_ok=True)
        return run
    name = re.sub(r"[^\w.-]+", "-", default_name)
    for number in itertools.count(1):
        run = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return run


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(in_memory: bool) -> int:
    """Processes to load images with: one per core less one, at most 8; none for data that is in memory already."""
    return 0 if in_memory else min(8, max(num_cores() - 1, 1))


def set_threads(num_threads: int | None, num_workers: int) -> None:
    """CPU threads of the network: as given, as OMP_NUM_THREADS says, or the cores that the workers leave."""
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads or max(num_cores() - num_workers, 1))


def build_trainer(
    config: TrainConfig, device: torch.device, run: Path, columns: Mapping[str, str], callbacks: list[Callback]
) -> lightning.Trainer:
    """Lightning's trainer with logs, checkpoints and progress in ``run``; for ``columns`` see `EpochLines`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    interactive = sys.stderr.isatty()
    callbacks = [
        *callbacks,
        ModelCheckpoint(run, filename=Path(LAST).stem, enable_version_counter=False),
        EpochLines(columns),
    ]
    if interactive:
        callbacks.append(ProgressBar(leave=False))
    return lightning.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=config.precision,
        max_epochs=config.epochs,
        gradient_clip_val=config.optim.grad_clip,
        gradient_clip_algorithm="value",
        callbacks=callbacks,
        logger=[CSVLogger(run, name="", version=""), TensorBoardLogger(run, name="", version="tensorboard")],
        enable_progress_bar=interactive,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


class SaveBest(Callback):
    """Writes the model file whenever ``monitor``, the higher the better, is the best so far."""

    def __init__(self, path: Path, model: nn.Module, info: ModelInfo, monitor: str) -> None:
        self.path = path
        self.model = model
        self.info = info
        self.monitor = monitor
        self.best = float("-inf")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        if scores[self.monitor] > self.best:
            self.best = scores[self.monitor]
            metrics = {name.removeprefix("val/"): score for name, score in scores.items()}
            info = replace(self.info, metrics={**metrics, "epoch": trainer.current_epoch + 1})
            save_model(self.path, self.model.state_dict(), info)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class EstimateBatchNorm(Callback):
    """Averages the BatchNorm statistics over ``loader`` before each evaluation, as EfficientViT's recipe does."""

    def __init__(self, loader: DataLoader, model: nn.Module) -> None:
        self.loader = loader
        self.model = model

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            update_bn(self.loader, self.model, device=pl_module.device)
        pl_module.eval()


class EpochLines(Callback):
    """One line an epoch, which stays when the progress bar goes (and is all there is without a terminal).

    ``columns`` maps the names of logged metrics to what is printed, with a place for the number: "top-1 {:.2f} %".
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        seconds = time.perf_counter() - self.start
        left = seconds * ((trainer.max_epochs or 0) - trainer.current_epoch - 1)
        values = "  ".join(text.format(float(metrics[name])) for name, text in self.columns.items())
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        tqdm.write(f"{epoch}  {values}  ({seconds:.1f} s, about {left:.0f} s to go)")
        sys.stdout.flush()


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the logger's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
