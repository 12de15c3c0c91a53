"""The settings of a segmenter's training, besides those of every training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qtvit.data.preprocess import parse_size
from qtvit.training.config import TrainConfig, require

from .model import AUX_WEIGHT, HEADS


@dataclass
class LossConfig:
    """Loss of each pixel's class; ignored pixels count in none of its parts.

    Args:
        kind: ce, the cross-entropy of all pixels, or ohem, that of hard pixels alone.
        ohem_threshold: a pixel is hard if its class has a lower probability.
        ohem_min_kept: smallest part of a crop's pixels that counts as hard.
        dice: weight of the Dice loss that is added; 0 for none.
        class_weights: balanced to weight the cross-entropy of each class by the inverse of its number of training
            pixels, or a number for each class.
        aux: weight of the auxiliary head's loss.
    """

    kind: Literal["ce", "ohem"] = "ce"
    ohem_threshold: float = 0.7
    ohem_min_kept: float = 0.0625
    dice: float = 0.0
    class_weights: Literal["balanced"] | list[float] | None = None
    aux: float = AUX_WEIGHT

    def __post_init__(self) -> None:
        for name in ("dice", "aux"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        for name in ("ohem_threshold", "ohem_min_kept"):
            require(0 < getattr(self, name) <= 1, f"loss.{name}", getattr(self, name), "above 0, at most 1")
        if isinstance(weights := self.class_weights, list):
            valid = all(weight >= 0 for weight in weights) and any(weights)
            require(valid, "loss.class_weights", weights, "numbers from 0 on, not all 0")


@dataclass
class SegmentAugment:
    """Augmentation of training images (torchvision's transforms).

    Args:
        scale: smallest and largest factor by which an image is resized, relative to its size in evaluation.
        hflip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue, each in half of the images.
        cat_max_ratio: crops in which one class covers more than this part are drawn again, a few times; 1 accepts all.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    photometric: bool = True
    cat_max_ratio: float = 0.75

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1], "augment.scale", self.scale, "0 < min <= max")
        require(0 <= self.hflip <= 1, "augment.hflip", self.hflip, "a probability from 0 to 1")
        require(0 < self.cat_max_ratio <= 1, "augment.cat_max_ratio", self.cat_max_ratio, "above 0, at most 1")


@dataclass
class SegmentConfig(TrainConfig):
    """Train a network for semantic segmentation.

    Args:
        data: folder of images and masks: train/images, train/masks, val/images and val/masks, or ADE20K's layout.
        head: upernet; light, for real time; or light_skip, which adds a finer map for sharper borders; default: the
            checkpoint's, else upernet.
        head_channels: channels of the head's maps; default: the checkpoint's, else 512 for upernet, and for the light
            heads those of the finest map that is summed.
        crop_size: side of the training crops, or HEIGHTxWIDTH such as 512x1024; also of sliding windows.
        img_size: shorter side, in pixels, that images are resized to (in training, before augment.scale); 0 for their
            own size; default: the shorter side of crop_size.
        window: evaluate with sliding windows of crop_size, not on whole images.
        classes: file of class names and colours; default: classes.txt or classes.yaml in the folder, else ADE20K's,
            else the values that the masks have.
        ignore_index: label of pixels without a class, and their value in index masks; -1 if there are none.
        drop_rate: dropout of channels before the classifiers.
        loss: the loss that training minimises.
        augment: augmentation of training images.
    """

    task: ClassVar[str] = "segment"

    batch_size: int = 16
    lr: float = 1e-4
    head: str | None = None
    head_channels: int | None = None
    crop_size: int | str = 512
    img_size: int | None = None
    window: bool = False
    classes: str | None = None
    ignore_index: int = 255
    drop_rate: float = 0.1
    loss: LossConfig = field(default_factory=LossConfig)
    augment: SegmentAugment = field(default_factory=SegmentAugment)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head in (None, *HEADS), "head", self.head, f"one of {', '.join(HEADS)}")
        require(self.head_channels is None or self.head_channels > 0, "head_channels", self.head_channels, "1 or more")
        require(self.img_size is None or self.img_size >= 0, "img_size", self.img_size, "0 or more")
        require(0 <= self.drop_rate < 1, "drop_rate", self.drop_rate, "from 0 to below 1")
        self.crop_shape()

    def crop_shape(self) -> tuple[int, int]:
        """``crop_size`` as (H, W)."""
        return parse_size(self.crop_size, "--crop-size")

    @property
    def base_size(self) -> int | None:
        """The shorter side of images at scale 1; None for each image's own."""
        return min(self.crop_shape()) if self.img_size is None else self.img_size or None
