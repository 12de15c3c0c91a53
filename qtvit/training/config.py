"""What a training run is made of, and its command-line and YAML form.

A value comes from the command line, else from the recipe, else from the default here. All three are checked against
these dataclasses; a name that does not exist is an error.
"""

from __future__ import annotations

import json
import re
from argparse import HelpFormatter
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from qtvit.data.transforms import parse_size
from qtvit.errors import unknown_name
from qtvit.files import write_text


@dataclass
class OptimConfig:
    """Optimiser, schedule and loss.

    Args:
        loss: ce, softmax cross-entropy, or bce, binary cross-entropy of every class on its own, as in the paper.
        weight_decay: of AdamW; not applied to norms and biases.
        betas: of AdamW.
        warmup_epochs: epochs over which the learning rate rises linearly, the first of ``epochs`` (at most
            half of them); then it falls along a cosine.
        drop_path_ramp: let the model's drop_path_rate rise linearly from 0 after the warm-up to its value at the end.
        grad_clip: largest absolute value of a gradient entry; null to not clip.
        label_smoothing: probability mass spread over all classes.
        layer_decay: factor of the learning rate from each block to the one before it; 1 for the same in all, about 0.8
            to fine-tune.
        class_weights: balanced to weigh the loss of each class by the inverse of its number of training images.
    """

    loss: Literal["ce", "bce"] = "ce"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 1.0
    drop_path_ramp: bool = False
    grad_clip: float | None = 2.0
    label_smoothing: float = 0.1
    layer_decay: float = 1.0
    class_weights: Literal["balanced"] | None = None

    def __post_init__(self) -> None:
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers from 0 to below 1")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        _require(
            self.grad_clip is None or self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "more than 0, or null"
        )
        _require(0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing, "from 0 to below 1")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass
class AugmentConfig:
    """Augmentation of training images (timm's transforms).

    Args:
        scale: smallest and largest part of the image's area in a random crop.
        ratio: smallest and largest aspect ratio of that crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; without effect beside auto_augment.
        auto_augment: timm's augmentation string, such as rand-m9-mstd0.5-inc1; null for none.
        interpolation: of the resize; random for any of the others.
        random_erasing: probability of erasing a rectangle.
        train_sizes: sizes (as img_size) of training images, of which each batch draws one; empty for img_size alone.
        mixup: probability that a batch is mixed by MixUp.
        cutmix: probability that a batch is mixed by CutMix (and not by MixUp).
        mix_alpha: a of the Beta(a, a) that both draw their ratio from, once a batch.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.3
    auto_augment: str | None = None
    interpolation: Literal["random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "random"
    random_erasing: float = 0.0
    train_sizes: list[int | str] = field(default_factory=list)
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_alpha: float = 0.2

    def __post_init__(self) -> None:
        _require(0 < self.scale[0] <= self.scale[1] <= 1, "augment.scale", self.scale, "0 < min <= max <= 1")
        _require(0 < self.ratio[0] <= self.ratio[1], "augment.ratio", self.ratio, "0 < min <= max")
        _require(self.color_jitter >= 0, "augment.color_jitter", self.color_jitter, "0 or more")
        for name in ("hflip", "vflip", "random_erasing", "mixup", "cutmix"):
            _require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a probability from 0 to 1")
        both = self.mixup + self.cutmix
        _require(both <= 1, "augment.cutmix", self.cutmix, f"at most {1 - self.mixup:g} beside mixup {self.mixup:g}")
        _require(self.mix_alpha > 0, "augment.mix_alpha", self.mix_alpha, "more than 0")
        self.train_shapes()

    def train_shapes(self) -> list[tuple[int, int]]:
        """``train_sizes`` as (H, W)."""
        return [parse_size(size, "--augment.train-sizes") for size in self.train_sizes]


@dataclass
class EmaConfig:
    """Exponential moving average of the weights: if there is one, it is what is evaluated and saved.

    Args:
        decay: part of the average that a step keeps; 0 for no average.
        warmup_steps: the decay at step t is decay * (1 - exp(-t / warmup_steps)).
        mesa_ratio: weight of a second loss whose targets are what the average says of the same images (MESA); 0 for
            none.
        mesa_start: part of the training after the warm-up from which MESA is on.
    """

    decay: float = 0.0
    warmup_steps: int = 4000
    mesa_ratio: float = 0.0
    mesa_start: float = 0.25

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to below 1")
        _require(self.warmup_steps >= 0, "ema.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.mesa_ratio >= 0, "ema.mesa_ratio", self.mesa_ratio, "0 or more")
        _require(0 <= self.mesa_start <= 1, "ema.mesa_start", self.mesa_start, "from 0 to 1")
        _require(self.mesa_ratio == 0 or self.decay > 0, "ema.mesa_ratio", self.mesa_ratio, "0 without an ema.decay")


@dataclass
class DistillConfig:
    """Distillation: a teacher's view of the same images adds to the loss of the labels.

    Args:
        teacher: run folder or model file; default: the checkpoint as it was, with its own kernel.
        logits: weight of the divergence from the teacher's class probabilities; 0 for none.
        features: weight of the relative squared error of the outputs of the stages with attention; 0 for none.
        temperature: divisor of all logits before they are compared; above 1, improbable classes count for more.
    """

    teacher: str | None = None
    logits: float = 0.0
    features: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("logits", "features"):
            _require(getattr(self, name) >= 0, f"distill.{name}", getattr(self, name), "0 or more")
        _require(self.temperature > 0, "distill.temperature", self.temperature, "more than 0")
        used = self.teacher is None or self.logits > 0 or self.features > 0
        _require(used, "distill.teacher", self.teacher, "null without distill.logits and distill.features")


@dataclass
class TrainConfig:
    """Train an image classifier.

    Args:
        data: folder with train/CLASS and val/CLASS (or CLASS alone, then a part is held out), or digits for the
            built-in data.
        model: qtvit_nano, qtvit_0 … qtvit_6 (see qtvit models), or any of timm's models; default: the checkpoint's,
            else qtvit_1.
        img_size: side of the training and evaluation images, or HEIGHTxWIDTH such as 160x256; default: the
            checkpoint's or the model's own.
        epochs: passes over the training images, warm-up included.
        eval_every: epochs from one evaluation to the next; the last epoch is evaluated in any case.
        batch_size: images per step and device.
        lr: peak learning rate per device: it is multiplied by the number of devices.
        checkpoint: run folder or model file to start from; default: random weights.
        swap_kernel: take over the weights of a checkpoint whose model has another kernel, or no positional maps or
            shortcut, such as an EfficientViT; it is evaluated before the first step too, as epoch 0.
        resume: run folder whose training is to go on where it stopped; its own settings apply, but for data, device,
            num_workers, num_threads and checkpoint_every_steps.
        checkpoint_every_steps: steps after which the training state is saved within an epoch too; null for its end
            alone.
        freeze: backbone to train the classifier's head alone, stages=N to keep the first N stages as they are.
        freeze_bn: keep the BatchNorm statistics of the checkpoint.
        early_stopping: evaluations without a better held-out top-1 after which training ends; null for never.
        output: run folder to create; default: runs/MODEL-DATA, numbered when taken.
        seed: of the split, the initial weights and the augmentation.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: arithmetic of the training step.
        accumulate: batches whose gradients are added up before a step.
        grad_checkpointing: keep less of the forward pass and compute it again in the backward pass.
        compile: run the training step through torch.compile.
        sync_bn: BatchNorm statistics over all GPUs, not of each one's own images.
        num_workers: processes that load images; default: one per core less one, at most 8, and none for the digits.
        num_threads: CPU threads of the network; default: the cores that num_workers leaves (threads and workers that
            share cores slow each other down many times over).
        bn_images: training images on which the BatchNorm statistics are estimated anew before each evaluation, as the
            running averages lag far behind a fast-learning network; 0 to keep the running averages.
        bn_batch_size: images per batch and device in that estimation; default: batch_size.
        on_bad_image: stop at an image that cannot be read, or skip all of those (then all are read once, first).
        val_fraction: part of each class held out when the data has no val folder.
        train_images: number of training images to use, drawn class by class in proportion; for data with a val part
            the same whatever the seed, and a larger number adds to them. Default: all.
        crop_pct: part of the image's shorter side that evaluation sees; default: the model's own.
        model_args: further arguments of the model, such as {kernel: taylor2_paper, drop_path_rate: 0.1}.
        optim: optimiser, schedule and loss.
        augment: augmentation of training images.
        ema: moving average of the weights.
        distill: learning from a teacher.
    """

    data: str
    model: str | None = None
    img_size: int | str | None = None
    epochs: int = 100
    eval_every: int = 1
    batch_size: int = 64
    lr: float = 1e-3
    checkpoint: str | None = None
    swap_kernel: bool = False
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
    compile: bool = False
    sync_bn: bool = False
    num_workers: int | None = None
    num_threads: int | None = None
    bn_images: int = 2048
    bn_batch_size: int | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    val_fraction: float = 0.2
    train_images: int | None = None
    crop_pct: float | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        from_1 = ("epochs", "eval_every", "batch_size", "accumulate", "num_threads", "bn_batch_size", "early_stopping")
        for name in (*from_1, "checkpoint_every_steps", "train_images", "seed", "num_workers", "bn_images"):
            value, least = getattr(self, name), 0 if name in ("seed", "num_workers", "bn_images") else 1
            _require(value is None or value >= least, name, value, f"{least} or more")
        _require(self.lr > 0, "lr", self.lr, "more than 0")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _require(self.crop_pct is None or 0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "above 0, at most 1")
        _require(
            self.freeze is None or re.fullmatch(r"backbone|stages=[1-9]\d*", self.freeze) is not None,
            "freeze",
            self.freeze,
            "backbone, or stages=N",
        )
        if self.checkpoint is None:
            if self.swap_kernel:
                raise ValueError("--swap-kernel true takes over the weights of a --checkpoint, and none is given")
            if self.distill.teacher is None and (self.distill.logits or self.distill.features):
                raise ValueError("--distill.logits and --distill.features need a --distill.teacher or a --checkpoint")
        for name in ("num_classes", "in_chans"):
            _require(name not in self.model_args, f"model_args.{name}", self.model_args.get(name), "left to the data")
        self.image_shape()

    def image_shape(self) -> tuple[int, int] | None:
        """``img_size`` as (H, W)."""
        return None if self.img_size is None else parse_size(self.img_size)


DEFAULT_MODEL = "qtvit_1"
RESUMABLE = ("resume", "data", "device", "num_workers", "num_threads", "checkpoint_every_steps")
"""Options that may be given when a run goes on."""


def parse_config(argv: list[str]) -> TrainConfig:
    """The configuration that ``--recipe NAME`` and the other options of ``argv`` describe; options win over the recipe.

    Raises:
        ValueError: an option or key that does not exist, or a value that it does not take.
        FileNotFoundError: a recipe file that does not exist.
    """
    parser = _Parser(prog="qtvit train classify", description="Train an image classifier.", exit_on_error=False)
    parser.add_argument(
        "--recipe", action="config", help=f"what to start from: {', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_class_arguments(TrainConfig, as_group=False)
    argv = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in argv]
    options = ["recipe", "help", "print_config", *_dotted_names(TrainConfig)]
    given = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--")]
    for name in given:
        if name not in options and not name.startswith("model_args."):
            raise unknown_name("option", _as_option(name), map(_as_option, options))
    if "resume" in given:
        argv = _resumed(argv, given)
    try:
        values = parser.instantiate(parser.parse_args(_recipe_first(argv)))
    except ArgumentError as error:
        message = re.sub(r'Parser key "(\S+)":', lambda key: f"{_as_option(key[1])}:", " ".join(str(error).split()))
        message = re.sub(r"required: (\w)", r"required: --\1", message)
        raise ValueError(re.sub(r"<class '(\w+)'>|typing\.(Literal)", r"\1\2", message)) from error
    return TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration, a YAML file that ``--recipe`` takes."""
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def recipe_names() -> list[str]:
    """Names of the recipes that come with qtvit, without the parts that several share (``_base``)."""
    root = Path(str(resources.files("qtvit") / "recipes"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("[!_]*.yaml"))


def train_config(**options: Any) -> TrainConfig:
    """The configuration of the same options as keyword arguments: ``recipe``, those of `TrainConfig`, and those of its
    parts as dictionaries, such as ``optim={"layer_decay": 0.8}``. Errors as `parse_config`.
    """
    argv = []
    for name, value in options.items():
        group = value if isinstance(value, dict) and name != "model_args" else {"": value}
        for key, item in group.items():
            if name == "img_size" and isinstance(item, (list, tuple)):
                item = "x".join(map(str, item))
            text = str(item) if isinstance(item, (str, Path)) else json.dumps(item, default=_plain)
            argv.append(f"--{name}{'.' if key else ''}{key}={text}")
    return parse_config(argv)


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _resumed(argv: list[str], given: list[str]) -> list[str]:
    """``argv`` with the settings of the run that ``--resume`` names."""
    changed = [name for name in given if name not in ("help", *RESUMABLE)]
    if changed:
        raise ValueError(
            f"{_as_option(changed[0])} cannot change when a run goes on ({', '.join(map(_as_option, RESUMABLE[1:]))} "
            "can); --checkpoint RUN starts a new run from its weights"
        )
    run = Path(_take(argv, "--resume")[0] or "")
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run}: no config.yaml in this folder, so it is no run folder")
    return ["--recipe", str(run / "config.yaml"), *argv]


def _recipe_first(argv: list[str]) -> list[str]:
    """``argv`` with the content of its recipe in front, where jsonargparse lets everything else override it."""
    name, rest = _take(argv, "--recipe")
    return rest if name is None else ["--recipe", json.dumps(_read_recipe(_recipe_path(name))), *rest]


def _take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The last value of ``option`` in ``argv``, if it is there, and the rest."""
    value, rest = None, []
    remaining = iter(argv)
    for arg in remaining:
        name, equals, text = arg.partition("=")
        if name != option:
            rest.append(arg)
            continue
        value = text if equals else next(remaining, "--")
        if value.startswith("--"):
            raise ValueError(f"{option} needs a value")
    return value, rest


def _recipe_path(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe of ours, or the one that ``name`` is the path of, relative to the folder ``beside``."""
    if Path(name).suffix in (".yaml", ".yml"):
        return (beside or Path()) / name
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    return Path(str(resources.files("qtvit") / "recipes" / f"{name}.yaml"))


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values in a recipe file, laid over those of the recipe that its key ``base`` names; ``above`` lie over it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of names to values")
    base = content.pop("base", None)
    known = _dotted_names(TrainConfig)
    groups = {name.partition(".")[0] for name in known if "." in name} | {"model_args"}
    for key, value in content.items():
        if key in groups and not isinstance(value, dict):
            raise ValueError(f"{path}: {key} is a mapping of names to values, got {value!r}")
        group = value if isinstance(value, dict) and key != "model_args" else {}
        for name in (str(key), *(f"{key}.{name}" for name in group)):
            if name not in known:
                raise ValueError(f"{path}: {unknown_name('key', name, [*known, 'base'])}")
    if base is None:
        return content
    below = _recipe_path(str(base), path.parent)
    above = (*above, path.resolve())
    if below.resolve() in above:
        raise ValueError(f"{path}: its base {base} lies over it already")
    merged = _read_recipe(below, above)
    for key, value in content.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    return merged


def _dotted_names(config: type) -> list[str]:
    names = []
    for f in fields(config):
        group = f.default_factory
        names += [f.name, *(f"{f.name}.{g.name}" for g in fields(group))] if is_dataclass(group) else [f.name]
    return names


def _as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{_as_option(name)} must be {accepted}, got {value!r}")


class _Parser(ArgumentParser):
    """jsonargparse's parser with hyphens in its help, as ``parse_config`` accepts them."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return re.sub(r"--[\w.]+", lambda name: name[0].replace("_", "-"), super().format_help(formatter))
