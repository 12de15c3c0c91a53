"""What happens around the steps of every task's training: evaluation, checkpoints, logs, a way to stop."""

import csv
import io
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from qtvit import console
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.data.sampling import EpochBatches, StreamBatches
from qtvit.device import processes
from qtvit.files import replacing, write_text

from .optim import batch_norms
from .task import Task

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
LATEST_STEPS = 1000
"""So many count for the speed of training."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message says how to go on."""


class _Stop(BaseException):
    """On its way through Lightning, which would end the process at a KeyboardInterrupt."""


class EvaluateEvery(Callback):
    """Evaluation after every ``epochs`` epochs and after the last one; the others have their loss logged."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._set(trainer)  # Lightning enters no epoch that a run goes on in the middle of

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._set(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._is_due(trainer):
            assert isinstance(pl_module, Task)
            pl_module.log_epoch()

    def _set(self, trainer: lightning.Trainer) -> None:
        # Lightning evaluates epoch n if this number divides n. It has no word for the last epoch.
        trainer.check_val_every_n_epoch = 1 if self._is_due(trainer) else trainer.current_epoch + 2

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        return epoch % self.epochs == 0 or epoch == trainer.max_epochs


class SaveBest(Callback):
    """Writes the model file whenever ``monitor``, the higher the better, is the best so far."""

    def __init__(self, path: Path, info: ModelInfo, monitor: str) -> None:
        self.path = path
        self.info = info
        self.monitor = monitor
        self.best = float("-inf")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        if scores[self.monitor] > self.best:
            self.best = scores[self.monitor]
            metrics = {name.removeprefix("val/"): score for name, score in scores.items()}
            info = replace(self.info, metrics={**metrics, "epoch": trainer.current_epoch + 1})
            if trainer.is_global_zero:
                assert isinstance(pl_module, Task)
                save_model(self.path, pl_module.networks[""].state_dict(), info)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        if self.best > float("-inf") and not self.path.is_file() and processes()[0] == 0:
            self.best = float("-inf")
            console.say(f"{self.path} is gone; the best from now on will take its place")


class SaveState(Callback):
    """Writes ``last.ckpt``, from which the run can go on, after every epoch, when the user presses Ctrl-C, and within
    an epoch after every so many steps.

    The first Ctrl-C lets the step (or the evaluation) end and saves; the second ends training at once.

    A stream can only be entered at its beginning, so there the states are those at the end of an epoch.

    Args:
        run: the run folder.
        batches: of the training images; set to the right place when a run goes on.
        history: of the run.
        description: what is needed to go on besides Lightning's state; `run.find_state` returns it.
        every_steps: within an epoch; None for never.
    """

    def __init__(
        self,
        run: Path,
        batches: EpochBatches | StreamBatches,
        history: "History",
        description: dict[str, Any],
        every_steps: int | None = None,
    ) -> None:
        self.run = run
        self.batches = batches
        self.history = history
        self.description = description
        self.every_steps = every_steps
        self.stopping = False

    @contextmanager
    def listening(self, command: str) -> Iterator[None]:
        """Within this context, Ctrl-C is for this callback (in the main thread, where Python delivers it).

        Args:
            command: of qtvit that goes on with the run.

        Raises:
            Interrupted: it was pressed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        except _Stop:
            qtvit = "torchrun … -m qtvit" if processes()[1] > 1 else "qtvit"
            saved = f"to go on:  {qtvit} {command} --resume {self.run}"
            raise Interrupted(f"stopped; {saved if (self.run / LAST).exists() else 'nothing is saved yet'}") from None
        finally:
            signal.signal(signal.SIGINT, before)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_step = trainer.global_step  # Lightning enters no epoch that a run goes on in the middle of

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_step = trainer.global_step
        if trainer.current_epoch != self.batches.epoch:
            self.batches.go_to(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stopping = self._is_stopping(trainer)
        if batch_idx + 1 == len(self.batches):
            return  # the last step of an epoch belongs together with its evaluation
        if trainer.global_step == self.last_step:
            return  # gradients add up for the next step; they are not in the checkpoint
        self.last_step = trainer.global_step
        if stopping:
            self._save_and_leave(trainer)
        if self.every_steps and self.batches.any_batch and self.last_step % self.every_steps == 0:
            trainer.save_checkpoint(self.run / LAST)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._is_stopping(trainer):
            self._save_and_leave(trainer)
        trainer.save_checkpoint(self.run / LAST)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        mid_epoch = not self._is_epoch_done(trainer)
        epoch = trainer.current_epoch
        checkpoint["qtvit"] = {
            **self.description,
            "seconds": self.history.lap(),
            "seconds_per_batch": self.history.seconds_per_batch,
            "next": [epoch, done] if mid_epoch else [epoch + 1, 0],
            "finished": not mid_epoch and (epoch + 1 == trainer.max_epochs or trainer.should_stop),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.batches.go_to(*checkpoint["qtvit"]["next"])

    def _is_epoch_done(self, trainer: lightning.Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready == len(self.batches)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise _Stop
        self.stopping = True
        console.say("stopping after this step or evaluation; press Ctrl-C again to stop at once")

    def _is_stopping(self, trainer: lightning.Trainer) -> bool:
        """Whether any process was told to stop: all have to leave at the same step."""
        return trainer.strategy.reduce_boolean_decision(self.stopping, all=False)

    def _save_and_leave(self, trainer: lightning.Trainer) -> None:
        if self.batches.any_batch or self._is_epoch_done(trainer):
            trainer.save_checkpoint(self.run / LAST)
        raise _Stop


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, with the one before kept; read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
        except OSError as error:
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}); the checkpoint before it is kept"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


class EstimateBatchNorm(Callback):
    """Before each evaluation, the BatchNorm statistics of what is evaluated are the averages over ``loader``.

    This is EfficientViT's recipe: means and variances of batches of training images, augmented but not mixed, averaged
    over batches and processes. Everything but the BatchNorms is in evaluation mode. They stay in the moving average of
    the weights, if there is one; the trained weights beside it then get their running statistics back.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.running: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.train()
        names = [name for name, norm in batch_norms(pl_module.model).items() if norm.training]
        pl_module.eval()
        if pl_module.ema is not None:
            self.running = {name: buffer.clone() for name, buffer in pl_module.model.named_buffers()}
        if not names:
            return
        networks = pl_module.networks.values()
        norms: list[Any] = [network.get_submodule(name) for network in networks for name in names]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
            norm.train()
        with trainer.precision_plugin.val_step_context():
            for batch in self.loader:
                batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
                for network in networks:
                    pl_module.run_norms(network, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            for buffer in (norm.running_mean, norm.running_var):
                buffer.copy_(trainer.strategy.reduce(buffer, reduce_op="mean"))

    @torch.no_grad()
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        buffers = dict(pl_module.model.named_buffers())
        for name, before in self.running.items():
            buffers[name].copy_(before)
        self.running = {}


class History(Callback):
    """Keeps the metrics of every epoch, in a CSV file too, and the seconds of training.

    Args:
        path: of the CSV file, one row an epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self.step_seconds: deque[float] = deque(maxlen=LATEST_STEPS)
        """Of the latest steps, the time per batch, without loading them, evaluation and checkpoints."""
        self.since_step: list[float] = []
        """That of the batches whose gradients go into the next step."""
        self.evaluated = False
        """Whether this epoch was; Lightning keeps the scores of the evaluation before."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.evaluated = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()
        self.last_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.since_step.append(time.perf_counter() - self.step_start)
        if trainer.global_step != self.last_step:
            self.last_step = trainer.global_step
            self.step_seconds.append(statistics.fmean(self.since_step))
            self.since_step.clear()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        logged = sorted(trainer.logged_metrics.items())
        metrics = {name: float(value) for name, value in logged if self.evaluated or not name.startswith("val/")}
        metrics.pop("epoch", None)
        self.evaluated = False
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **metrics})
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if trainer.is_global_zero:
            write_text(self.path, text.getvalue())

    def lap(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        now = time.perf_counter()
        self.seconds += now - self.start
        self.start = now
        return self.seconds

    @property
    def seconds_per_batch(self) -> float:
        """Of the training step alone: the median of the latest steps, which the slow first ones do not change."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.lap(), "steps": {"seconds": list(self.step_seconds)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
        self.seconds = state_dict["seconds"]
        seconds = state_dict.get("steps", {}).get("seconds")
        if isinstance(seconds, list):  # earlier versions had a sum here
            self.step_seconds.extend(seconds)


class EpochLines(Callback):
    """Says a line an epoch, which stays when the progress bar goes.

    Args:
        history: what to say it of.
        columns: names of metrics and what is printed of them, with a place for the number: "top-1 {:.2f} %".
    """

    def __init__(self, history: History, columns: Mapping[str, str]) -> None:
        self.history = history
        self.columns = columns

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        row, num_epochs, seconds = self.history.rows[-1], trainer.max_epochs or 0, self.history.lap()
        epoch = round(row["epoch"])
        values = "  ".join(text.format(row[name]) for name, text in self.columns.items() if name in row)
        left = seconds / epoch * (num_epochs - epoch)
        console.say(f"epoch {epoch}/{num_epochs}  {values}  ({seconds:.0f} s, about {left:.0f} s to go)")


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the logger's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
