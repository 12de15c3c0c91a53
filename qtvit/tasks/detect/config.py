"""The settings of a detector's training, besides those of every training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qtvit.training.config import TrainConfig, require


@dataclass
class HeadsConfig:
    """The heads on the network. If the checkpoint is a detector, its own numbers are the defaults.

    Args:
        cascade: three stages of box heads (at IoU 0.5, 0.6 and 0.7) instead of one; default: false.
        fpn_chans: channels of the feature pyramid and the mask heads; default: 256.
        fpn_norm: BatchNorms in the pyramid; default: false.
        box_dim: channels of the box heads; default: 1024.
        anchor_scale: side of the anchors in strides of the feature maps; default: 8.
        proposals: regions of an image that the heads look at, twice as many in training; default: 1000.
        rois_per_image: number of these regions that the heads are trained on; default: 512.
    """

    cascade: bool | None = None
    fpn_chans: int | None = None
    fpn_norm: bool | None = None
    box_dim: int | None = None
    anchor_scale: float | None = None
    proposals: int | None = None
    rois_per_image: int | None = None

    def __post_init__(self) -> None:
        for name in ("fpn_chans", "box_dim", "proposals", "rois_per_image"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"heads.{name}", value, "1 or more")
        scale = self.anchor_scale
        require(scale is None or scale > 0, "heads.anchor_scale", scale, "more than 0")


@dataclass
class DetectAugment:
    """Augmentation of training images, with their boxes and masks (torchvision's transforms).

    Args:
        hflip: probability of a horizontal flip.
        photometric: probability of each of SSD's changes of brightness, contrast, saturation, hue and channels.
        zoom: smallest and largest factor by which objects grow: a part of the image is cut out, or a frame added.
    """

    hflip: float = 0.5
    photometric: float = 0.2
    zoom: tuple[float, float] = (0.7, 1.4)

    def __post_init__(self) -> None:
        for name in ("hflip", "photometric"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a probability from 0 to 1")
        require(0 < self.zoom[0] <= self.zoom[1], "augment.zoom", self.zoom, "0 < min <= max")


@dataclass
class DetectConfig(TrainConfig):
    """Train an object detector, with masks if the data have them.

    Args:
        data: folder in COCO's layout: annotations/instances_train*.json, train*/, and the same for val.
        train_annotations: annotation file of the training images, if it is elsewhere.
        train_images_dir: folder that its file names are relative to, if it is elsewhere.
        val_annotations: annotation file of the held-out images, if it is elsewhere.
        val_images_dir: folder that its file names are relative to, if it is elsewhere.
        masks: learn masks too (Mask R-CNN) or boxes alone (Faster R-CNN); auto: masks if the data have them.
        min_size: px of the shorter side that images are resized to; from several, one is drawn for each training image,
            and evaluation takes the largest. Default: the checkpoint's, else 640.
        max_size: px that the longer side may not exceed; default: the checkpoint's, else 1066.
        drop_empty: leave out training images without objects.
        batch_size: images per step and device.
        checkpoint: run folder or model file to start from: a classifier, whose network is used, or a whole detector,
            whose last layers start anew if it knows other categories. Default: random weights.
        heads: the heads on the network.
        augment: augmentation of training images.
    """

    task: ClassVar[str] = "detect"
    paths: ClassVar[tuple[str, ...]] = ("train_annotations", "train_images_dir", "val_annotations", "val_images_dir")
    """Settings that are paths of the data."""
    movable: ClassVar[tuple[str, ...]] = (*TrainConfig.movable, *paths)

    epochs: int = 36
    batch_size: int = 8
    lr: float = 2e-4
    bn_images: int = 512
    train_annotations: str | None = None
    train_images_dir: str | None = None
    val_annotations: str | None = None
    val_images_dir: str | None = None
    masks: bool | Literal["auto"] = "auto"
    min_size: list[int] = field(default_factory=list)
    max_size: int | None = None
    drop_empty: bool = False
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    augment: DetectAugment = field(default_factory=DetectAugment)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(side >= 1 for side in self.min_size), "min_size", self.min_size, "1 or more")
        if self.max_size is not None and self.max_size < max(self.min_size, default=1):
            raise ValueError(f"--max-size {self.max_size} is less than --min-size {max(self.min_size)}")
        require(not self.compile, "compile", self.compile, "false: every batch of a detector has another size")
