"""What the training of every task shares: the network, its moving average, optimiser, schedule and stochastic depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import timm.layers
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from qtvit.data.sampling import seed_everywhere
from qtvit.layers import recompute_activations, set_drop_path

from .config import TrainConfig
from .ema import MovingAverage
from .optim import batch_norms, freeze, make_optimizer, warmup_cosine


class Task(lightning.LightningModule):
    """A network in training. A task adds ``training_step`` (which calls `count_loss`) and its evaluation.

    Args:
        model: the network.
        config: of the run.
        loss_parts: names of losses to log besides the whole.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, loss_parts: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.ema = MovingAverage(model, config.ema.decay, config.ema.warmup_steps) if config.ema.decay else None
        self.loss_names = ("loss", *loss_parts)
        self.loss_sums = torch.zeros(len(self.loss_names) + 1)
        """Of this process: each loss times images, and images. No buffer, or DDP would share it."""
        self.num_backoffs = 0
        self.num_steps = self.num_warmup = 1
        self.frozen = freeze(model, config.freeze)
        if config.optim.drop_path_ramp and any(isinstance(m, timm.layers.DropPath) for m in model.modules()):
            raise ValueError(f"--optim.drop-path-ramp: the rates of {type(model).__name__} are fixed; qtvit's can rise")
        if config.grad_checkpointing:
            _checkpoint_gradients(model)
        elif config.recompute_activations:
            recompute_activations(model)
        if config.compile:
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, config.num_sizes)
            model.compile(dynamic=False)  # a graph for each image size
        self.train()

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.config.freeze_bn:
            for norm in batch_norms(self.model).values():  # not those of the beginning: Lightning may replace them
                norm.eval()
        return self

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated, by the prefix of its scores: the moving average if there is one, then raw_ the rest."""
        return {"": self.model} if self.ema is None else {"": self.ema.module, "raw_": self.model}

    @property
    def progress(self) -> float:
        """The part of the training after the warm-up that is done; 0 in the warm-up."""
        return max(self.global_step - self.num_warmup, 0) / max(self.num_steps - self.num_warmup, 1)

    def run_norms(self, network: nn.Module, batch: Any) -> None:
        """Run all BatchNorms of ``network`` on a training batch, for their statistics."""
        images, _ = batch
        network.forward(images.contiguous(memory_format=torch.channels_last))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_everywhere(self.config.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.config.optim.drop_path_ramp:
            set_drop_path(self.model, self.progress)

    def count_loss(self, loss: Tensor, num_images: int, parts: Mapping[str, Tensor] | None = None) -> None:
        """Take the loss of a step, and its ``loss_parts``, into the means of the epoch."""
        losses = {"loss": loss, **(parts or {})}
        counted = [losses[name].detach().float() * num_images for name in self.loss_names]
        self.loss_sums = self.loss_sums.to(loss.device) + torch.stack([*counted, counted[0].new_full((), num_images)])
        self.log("loss", loss.detach(), prog_bar=True, logger=False)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:  # an evaluation before the first step has no epoch
            self.log_epoch()

    def log_epoch(self) -> None:
        """Log what there is to say of an epoch whether it is evaluated or not."""
        *losses, num_images = self.trainer.strategy.reduce(self.loss_sums, reduce_op="sum")
        for name, loss in zip(self.loss_names, losses, strict=True):
            self.log(f"train/{name}", loss / num_images)
        self.log("lr", self.trainer.optimizers[0].param_groups[-1]["lr"])
        if self.config.precision == "16-mixed":
            self.log("train/backoffs", float(self.num_backoffs))
        self.loss_sums = torch.zeros_like(self.loss_sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        gathered: Any = self.all_gather(self.loss_sums)  # of every process, so that each finds its own
        loss_sums = gathered.reshape(-1, len(self.loss_sums)).cpu()
        checkpoint["task"] = {"loss_sums": loss_sums, "num_backoffs": self.num_backoffs}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loss_sums = checkpoint["task"]["loss_sums"][self.global_rank]
        self.num_backoffs = checkpoint["task"]["num_backoffs"]

    def configure_optimizers(self) -> Any:
        config, optim = self.config, self.config.optim
        optimizer = make_optimizer(self.model, config.lr * self.trainer.world_size, optim)
        self.num_steps = int(self.trainer.estimated_stepping_batches)
        self.num_warmup = round(self.num_steps * min(optim.warmup_epochs / config.epochs, 0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, num_steps=self.num_steps, num_warmup=self.num_warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def _checkpoint_gradients(model: Any) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise ValueError(f"--grad-checkpointing: {type(model).__name__} has no set_grad_checkpointing")
    model.set_grad_checkpointing()
