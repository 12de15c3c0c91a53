"""Stopping at numbers that are not finite, and finding out where they come from."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from qtvit.data.sampling import EpochBatches, StreamBatches
from qtvit.files import write_text

from .task import Task

BAD_BATCH = "bad_batch{}.json"
"""With the number of the process, if there are several."""


class StopAtNonFinite(Callback):
    """Ends the run at the first loss or gradient that is NaN or infinite, before it reaches the weights.

    The error names the first layer with such numbers, and ``bad_batch.json`` in the run folder lists the images that
    led there. With a loss scaler (16-mixed), gradients that overflow are what lowers the scale: those are counted, and
    are an error once there is nothing left to lower.

    Args:
        run: the run folder; that of the first process counts.
        batches: of the training images.
        names: of the training images, by index.
    """

    def __init__(self, run: Path, batches: EpochBatches | StreamBatches, names: Sequence[object]) -> None:
        self.run = run
        self.batches = batches
        self.names = names
        self.since_step: list[int] = []
        """Numbers of the batches whose gradients go into the next step."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.run = trainer.strategy.broadcast(self.run)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch
        self.since_step.append(batch_idx)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        if not loss.isfinite():
            assert isinstance(pl_module, Task)
            layer = self._replay(trainer, pl_module)
            self._stop(pl_module, f"the loss is {loss.item()}", layer, self.since_step[-1:])

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Task)
        gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
        if not get_total_norm(gradients, math.inf).isfinite():
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is None or scaler.get_scale() <= 1:
                self._stop(pl_module, "a gradient is not finite", _last_bad_gradient(pl_module.model), self.since_step)
            pl_module.num_backoffs += 1
        self.since_step.clear()

    def _replay(self, trainer: lightning.Trainer, task: Task) -> str:
        """The first layer with an output that is not finite, when the last step is taken again."""
        bad = [name for name, parameter in task.model.named_parameters() if not parameter.isfinite().all()]
        if bad:
            return f"{bad[0]} (its values)"
        found: list[str] = []
        handles = [m.register_forward_hook(_checker(name, found)) for name, m in task.model.named_modules() if name]
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                trainer.precision_plugin.train_step_context(),
            ):
                task.on_train_batch_start(self.batch, self.since_step[-1])
                task.training_step(self.batch, self.since_step[-1])
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else "the loss itself"

    def _stop(self, task: Task, what: str, layer: str, batches: Sequence[int]) -> None:
        epoch = task.current_epoch
        keys = [key for batch in batches for key in self.batches.keys(batch)]
        indices = [index for _, index, _ in keys]
        rank = f"-{task.global_rank}" if task.trainer.world_size > 1 else ""
        path = self.run / BAD_BATCH.format(rank)
        record = {
            "problem": what,
            "layer": layer,
            "epoch": epoch + 1,
            "batches": [batch + 1 for batch in batches],
            "step": task.global_step,
            "indices": indices,
            "images": [str(self.names[index]) for index in indices],
        }
        write_text(path, json.dumps(record, indent=2) + "\n")
        images = (
            f"its images are listed in {path}" if indices else f"see {path} (which images a stream gave is not known)"
        )
        raise FloatingPointError(
            f"{what} in epoch {epoch + 1}, batch {batches[-1] + 1}; first bad layer: {layer}; {images}; "
            "try a lower --lr"
        )


def _checker(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    return check


def _last_bad_gradient(model: nn.Module) -> str:
    """The layer that the backward pass came to first, of those with a gradient that is not finite."""
    parameters = reversed(list(model.named_parameters()))
    bad = (name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all())
    return next(bad).rpartition(".")[0]
