"""What a training run of any task is made of: typed settings that check themselves.

A value comes from the command line, else from the recipe, else from the default here; `qtvit.training.options` reads
them.
"""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Args:
        name: adamw; or muon, which makes the update of each weight matrix orthogonal (Jordan et al. 2024; timm's, in
            AdamW's learning rates) and leaves depthwise convolutions, norms, biases and positional maps to NAdamW.
        weight_decay: not applied to norms and biases.
        betas: of AdamW and NAdamW.
        momentum: of muon's matrices.
        warmup_epochs: epochs over which the learning rate rises linearly, the first of ``epochs`` (at most
            half of them); then it falls along a cosine.
        drop_path_ramp: let the model's drop_path_rate rise linearly from 0 after the warm-up to its value at the end.
        grad_clip: largest absolute value of a gradient entry; null to not clip.
        layer_decay: factor of the learning rate from each block to the one before it; 1 for the same in all, about 0.8
            to fine-tune.
    """

    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.95
    warmup_epochs: float = 1.0
    drop_path_ramp: bool = False
    grad_clip: float | None = 2.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers from 0 to below 1")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0 to below 1")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.grad_clip is None or self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "more than 0, or null")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass
class EmaConfig:
    """Exponential moving average of the weights: if there is one, it is what is evaluated and saved.

    Args:
        decay: part of the average that a step keeps; 0 for no average.
        warmup_steps: the decay at step t is decay * (1 - exp(-t / warmup_steps)).
    """

    decay: float = 0.0
    warmup_steps: int = 4000

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to below 1")
        require(self.warmup_steps >= 0, "ema.warmup_steps", self.warmup_steps, "0 or more")


@dataclass
class TrainConfig:
    """What the training of every task takes.

    Args:
        data: folder of the images and what is known of them.
        model: qtvit_nano, qtvit_0 … qtvit_6 (see qtvit models), or any of timm's models; default: the checkpoint's,
            else qtvit_1.
        epochs: passes over the training images, warm-up included.
        eval_every: epochs from one evaluation to the next; the last epoch is evaluated in any case.
        batch_size: images per step and device.
        lr: peak learning rate per device: it is multiplied by the number of devices.
        checkpoint: run folder or model file to start from; default: random weights.
        resume: run folder whose training is to go on where it stopped; its own settings apply, but for data, device,
            num_workers, num_threads and checkpoint_every_steps.
        checkpoint_every_steps: steps after which the training state is saved within an epoch too; null for its end
            alone.
        freeze: backbone to train the head alone, stages=N to keep the first N stages as they are.
        freeze_bn: keep the BatchNorm statistics of the checkpoint.
        early_stopping: evaluations without a better held-out score after which training ends; null for never.
        output: run folder to create; default: runs/MODEL-DATA, numbered when taken.
        seed: of the split, the initial weights and the augmentation.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: arithmetic of the training step.
        accumulate: batches whose gradients are added up before a step.
        grad_checkpointing: keep less of the forward pass and compute it again in the backward pass.
        recompute_activations: train in about half the memory: keep the outputs of convolutions alone and compute the
            rest again in the backward pass. No effect with grad_checkpointing (which keeps less still), with compile
            (which decides about it by itself), and on timm's models.
        compile: run the training step through torch.compile.
        sync_bn: BatchNorm statistics over all GPUs, not of each one's own images.
        num_workers: processes that load images; default: one per core less one, at most 8, and none for the digits.
        num_threads: CPU threads of the network; default: the cores that num_workers leaves (threads and workers that
            share cores slow each other down many times over).
        bn_images: training images on which the BatchNorm statistics are estimated anew before each evaluation, as the
            running averages lag far behind a fast-learning network; 0 to keep the running averages.
        bn_batch_size: images per batch and device in that estimation; default: batch_size.
        train_images: number of training images to use. Default: all.
        model_args: further arguments of the model, such as {kernel: taylor2_paper, drop_path_rate: 0.1}.
        optim: optimiser and schedule.
        ema: moving average of the weights.
    """

    task: ClassVar[str]
    """As in ``qtvit train TASK``."""
    movable: ClassVar[tuple[str, ...]] = ("data", "device", "num_workers", "num_threads", "checkpoint_every_steps")
    """Options that may be given when a run goes on: where it runs, not what it is."""

    data: str
    model: str | None = None
    epochs: int = 100
    eval_every: int = 1
    batch_size: int = 64
    lr: float = 1e-3
    checkpoint: str | None = None
    resume: str | None = None
    checkpoint_every_steps: int | None = None
    freeze: str | None = None
    freeze_bn: bool = False
    early_stopping: int | None = None
    output: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accumulate: int = 1
    grad_checkpointing: bool = False
    recompute_activations: bool = False
    compile: bool = False
    sync_bn: bool = False
    num_workers: int | None = None
    num_threads: int | None = None
    bn_images: int = 2048
    bn_batch_size: int | None = None
    train_images: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        from_1 = ("epochs", "eval_every", "batch_size", "accumulate", "num_threads", "bn_batch_size", "early_stopping")
        for name in (*from_1, "checkpoint_every_steps", "train_images", "seed", "num_workers", "bn_images"):
            value, least = getattr(self, name), 0 if name in ("seed", "num_workers", "bn_images") else 1
            require(value is None or value >= least, name, value, f"{least} or more")
        require(self.lr > 0, "lr", self.lr, "more than 0")
        require(
            self.freeze is None or re.fullmatch(r"backbone|stages=[1-9]\d*", self.freeze) is not None,
            "freeze",
            self.freeze,
            "backbone, or stages=N",
        )
        for name in ("num_classes", "in_chans"):
            require(name not in self.model_args, f"model_args.{name}", self.model_args.get(name), "left to the data")

    @property
    def num_sizes(self) -> int:
        """Of how many image sizes each batch draws one, besides that of the evaluation; 0: all batches have that."""
        return 0


DEFAULT_MODEL = "qtvit_1"


def as_option(name: str) -> str:
    """What a setting is called at the command line."""
    return "--" + name.replace("_", "-")


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    """ValueError about the ``value`` of setting ``name`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{as_option(name)} must be {accepted}, got {value!r}")
