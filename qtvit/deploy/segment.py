"""From pictures to a class for each pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo
from qtvit.data import ImageSource
from qtvit.data.masks import MaskClasses
from qtvit.data.segmentation_transforms import SegmentationEvalTransform

from .predictor import Predictor
from .runtimes import Exported, Runtime
from .windows import label_map

MAX_WHOLE = 1024 * 1024
"""Pixels up to which an image is given to the network whole, unless windows are asked for."""


@dataclass(frozen=True)
class Views:
    """How an image is looked at.

    Attributes:
        window: sliding windows of the size of training crops; None: for images of more than `MAX_WHOLE` pixels, and
            where the model was trained to be evaluated like that.
        flip: average with the mirrored image.
        scales: average over these sizes, relative to the usual one.
        img_size: shorter side that the image is resized to; 0 for its own; None for the model's.
    """

    window: bool | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    img_size: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be numbers above 0, got {', '.join(map(str, self.scales)) or 'none'}")
        if self.img_size is not None and self.img_size < 0:
            raise ValueError(f"img_size must be 0 or more, got {self.img_size}")


@dataclass(frozen=True)
class SegmentPreprocess:
    """The evaluation protocol of a segmenter.

    Attributes:
        size: (H, W) of training crops and of sliding windows; an exported file of fixed size takes this one.
        img_size: shorter side that images are resized to; None for their own.
        window: whether images are seen in sliding windows.
        mean, std: per channel, for pixels from 0 to 1.
    """

    size: tuple[int, int]
    img_size: int | None
    window: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, info: ModelInfo) -> "SegmentPreprocess":
        """That of a model."""
        given = info.preprocess
        height, width = given["size"]
        return cls((height, width), given["img_size"], given["window"], tuple(given["mean"]), tuple(given["std"]))

    def view(self, image: Image.Image, scale: float = 1.0, img_size: int | None = None) -> Tensor:
        """(3, h, w) normalised pixels of an image; ``img_size`` as in `Views`."""
        side = (self.img_size if img_size is None else img_size) or min(image.size)
        side = max(round(side * scale), 1)
        return SegmentationEvalTransform(side, mean=self.mean, std=self.std).image(image)

    def sliding_window(self, pixels: Tensor, window: bool | None = None) -> tuple[int, int] | None:
        """The size of the windows in which to see (3, h, w) ``pixels``; None to see them whole."""
        usual = self.window or pixels.shape[-2] * pixels.shape[-1] > MAX_WHOLE
        return self.size if (usual if window is None else window) else None


@dataclass(frozen=True)
class Segmentation:
    """The classes of the pixels of one image.

    Attributes:
        labels: (H, W) int16, indices of `names`.
        mask_classes: what they mean in masks: names, values and colours.
    """

    labels: np.ndarray
    mask_classes: MaskClasses

    @property
    def names(self) -> tuple[str, ...]:
        """The classes."""
        return self.mask_classes.names

    def shares(self) -> dict[str, float]:
        """The part of the image that each class has, of those that are in it, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return {self.names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}

    def index_image(self) -> Image.Image:
        """The mask, with the values that masks of the training data have."""
        return self.mask_classes.index_image(self.labels)

    def color_image(self) -> Image.Image:
        """The mask in the colours of the classes."""
        return self.mask_classes.paint(self.labels)

    def overlay(self, image: Image.Image, opacity: float = 0.55) -> Image.Image:
        """``image``, in the size of the labels, under the colours of the classes."""
        return Image.blend(image, self.color_image(), opacity)


class SegmentPredictor(Predictor[Segmentation]):
    """A trained segmenter, see `Predictor`.

    Attributes:
        preprocess: its evaluation protocol.
        mask_classes: what its classes are in masks.
    """

    task = "segment"

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(model, info, device, threads)
        self.preprocess = SegmentPreprocess.of(info)
        self.mask_classes = mask_classes(info)

    @overload
    def predict(self, images: ImageSource, views: Views | None = None) -> Segmentation: ...
    @overload
    def predict(
        self, images: list[ImageSource] | list[str] | list[Path], views: Views | None = None
    ) -> list[Segmentation]: ...
    def predict(
        self, images: ImageSource | list[ImageSource] | list[str] | list[Path], views: Views | None = None
    ) -> Segmentation | list[Segmentation]:
        """The classes of an image's pixels, or those of each image of a list, at the images' own sizes.

        Raises:
            FileNotFoundError, ValueError: an image that is not there or cannot be read (see `qtvit.data.open_image`).
        """
        if isinstance(images, (list, tuple)):
            return list(self.iter_predict(images, views))
        return next(self.iter_predict([images], views))

    @overload
    def iter_predict(self, images: Sequence[ImageSource], views: Views | None = None) -> Iterator[Segmentation]: ...
    @overload
    def iter_predict(
        self, images: Sequence[ImageSource], views: Views | None = None, *, skip_broken: bool
    ) -> Iterator[Segmentation | None]: ...
    def iter_predict(
        self, images: Sequence[ImageSource], views: Views | None = None, *, skip_broken: bool = False
    ) -> Iterator[Segmentation | None]:
        """As `predict`, one result at a time; with ``skip_broken``, None for an image that cannot be read."""
        label = partial(self._label, views=views or Views())
        return self._iterate(images, 1, skip_broken, lambda image: image, label)

    def _label(self, images: list[Image.Image], views: Views) -> list[Segmentation]:
        return [Segmentation(self.label(image, views), self.mask_classes) for image in images]

    @torch.inference_mode()
    def label(self, image: Image.Image, views: Views) -> np.ndarray:
        """(H, W) int16 labels of an RGB image."""
        pixels = [self.preprocess.view(image, scale, views.img_size).to(self.device) for scale in views.scales]
        fixed = isinstance(self.runtime, Exported) and "hw" not in self.runtime.artifact.dynamic
        window = self.preprocess.size if fixed else self.preprocess.sliding_window(pixels[0], views.window)
        size = image.height, image.width
        labels = label_map(self.runtime, pixels, size, window=window, flip=views.flip, fixed=fixed)
        return labels.cpu().numpy()


def mask_classes(info: ModelInfo) -> MaskClasses:
    """What the classes of a model are in masks."""
    fields = dict(info.task_args["masks"])
    for name in ("colors", "ignored_colors"):
        fields[name] = tuple(map(tuple, fields[name]))
    return MaskClasses(tuple(info.classes), **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def mask_args(meaning: MaskClasses) -> dict[str, Any]:
    """What `mask_classes` reads from ``task_args``."""
    fields = asdict(meaning)
    del fields["names"]
    return fields
