"""The settings of a classifier's training, besides those of every training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qtvit.data.preprocess import parse_size
from qtvit.training.config import EmaConfig, OptimConfig, TrainConfig, require


@dataclass
class ClassifyOptim(OptimConfig):
    """Optimiser, schedule and loss.

    Args:
        loss: ce, softmax cross-entropy, or bce, binary cross-entropy of every class on its own, as in the paper.
        label_smoothing: probability that is spread evenly over all classes.
        class_weights: balanced to weight the loss of each class by the inverse of its number of training images.
    """

    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.1
    class_weights: Literal["balanced"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing, "from 0 to below 1")


@dataclass
class AugmentConfig:
    """Augmentation of training images (timm's transforms).

    Args:
        scale: smallest and largest area of a random crop, as parts of the image's area.
        ratio: smallest and largest aspect ratio of a random crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; no effect with auto_augment, except 3a.
        auto_augment: timm's augmentation string, such as rand-m9-mstd0.5-inc1; null for none.
        interpolation: interpolation of the resize; random to draw one of the others for each image.
        random_erasing: probability of erasing a rectangle.
        train_sizes: sizes of training images (as img_size); each batch draws one. Empty: img_size only.
        mixup: probability that a batch is mixed by MixUp.
        cutmix: probability that a batch is mixed by CutMix (and not by MixUp).
        mix_alpha: parameter a of Beta(a, a), from which MixUp and CutMix draw their ratio once per batch.
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
        require(0 < self.scale[0] <= self.scale[1] <= 1, "augment.scale", self.scale, "0 < min <= max <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], "augment.ratio", self.ratio, "0 < min <= max")
        require(self.color_jitter >= 0, "augment.color_jitter", self.color_jitter, "0 or more")
        for name in ("hflip", "vflip", "random_erasing", "mixup", "cutmix"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a probability from 0 to 1")
        both = self.mixup + self.cutmix
        require(both <= 1, "augment.cutmix", self.cutmix, f"at most {1 - self.mixup:g} beside mixup {self.mixup:g}")
        require(self.mix_alpha > 0, "augment.mix_alpha", self.mix_alpha, "more than 0")
        self.train_shapes()  # raises if a size is invalid

    def train_shapes(self) -> list[tuple[int, int]]:
        """``train_sizes`` as (H, W)."""
        return [parse_size(size, "--augment.train-sizes") for size in self.train_sizes]


@dataclass
class ClassifyEma(EmaConfig):
    """Exponential moving average of the weights: if there is one, it is what is evaluated and saved.

    Args:
        mesa_ratio: weight of a second loss, with the average's outputs for the same images as targets (MESA); 0: none.
        mesa_start: part of the training after the warm-up from which MESA is on.
    """

    mesa_ratio: float = 0.0
    mesa_start: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mesa_ratio >= 0, "ema.mesa_ratio", self.mesa_ratio, "0 or more")
        require(0 <= self.mesa_start <= 1, "ema.mesa_start", self.mesa_start, "from 0 to 1")
        require(self.mesa_ratio == 0 or self.decay > 0, "ema.mesa_ratio", self.mesa_ratio, "0 without an ema.decay")


@dataclass
class DistillConfig:
    """Distillation: the outputs of a teacher for the same images add to the loss of the labels.

    Args:
        teacher: run folder or model file; default: the checkpoint, with the kernel it was trained with.
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
            require(getattr(self, name) >= 0, f"distill.{name}", getattr(self, name), "0 or more")
        require(self.temperature > 0, "distill.temperature", self.temperature, "more than 0")
        used = self.teacher is None or self.logits > 0 or self.features > 0
        require(used, "distill.teacher", self.teacher, "null without distill.logits and distill.features")


@dataclass
class ClassifyConfig(TrainConfig):
    """Train an image classifier.

    Args:
        data: folder with train/CLASS and val/CLASS (or CLASS alone, then a part is held out), or digits for the
            built-in data.
        img_size: side of the training and evaluation images, or HEIGHTxWIDTH such as 160x256; default: the
            checkpoint's or the model's own.
        swap_kernel: take over the weights of a checkpoint whose model has another kernel, or no positional maps or
            shortcut, such as an EfficientViT; it is evaluated before the first step too, as epoch 0.
        on_bad_image: stop at an image that cannot be read, or skip all of those (then all are read once, first).
        val_fraction: part of each class that is held out if the data have no val folder.
        train_images: number of training images to use, drawn from each class in proportion; for data with a val part
            the same whatever the seed, and a larger number adds to them. Default: all.
        crop_pct: part of the image's shorter side that evaluation sees; default: the model's own.
        optim: optimiser, schedule and loss.
        augment: augmentation of training images.
        distill: learning from a teacher.
    """

    task: ClassVar[str] = "classify"

    optim: ClassifyOptim = field(default_factory=ClassifyOptim)
    ema: ClassifyEma = field(default_factory=ClassifyEma)
    img_size: int | str | None = None
    swap_kernel: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    val_fraction: float = 0.2
    crop_pct: float | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        require(self.crop_pct is None or 0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "above 0, at most 1")
        if self.checkpoint is None and self.swap_kernel:
            raise ValueError("--swap-kernel true takes over the weights of a --checkpoint, and none is given")
        if self.checkpoint is None and self.distill.teacher is None and (self.distill.logits or self.distill.features):
            raise ValueError("--distill.logits and --distill.features need a --distill.teacher or a --checkpoint")
        self.image_shape()  # raises if the size is invalid

    def image_shape(self) -> tuple[int, int] | None:
        """``img_size`` as (H, W)."""
        return None if self.img_size is None else parse_size(self.img_size)

    @property
    def num_sizes(self) -> int:
        return len(self.augment.train_sizes)
