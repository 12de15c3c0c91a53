"""From images to a class for each pixel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.checkpoints import ModelInfo
from qtvit.data import ImageSource
from qtvit.deploy.predictor import Predictor
from qtvit.deploy.runtimes import Exported, Runtime

from .masks import MaskClasses
from .model import resize
from .sliding import sliding_window
from .transforms import SegmentationEvalTransform

MAX_WHOLE = 1024 * 1024
"""Pixels, as the network sees them; a larger image is seen in windows unless that is ruled out."""

Network = Callable[[Tensor], Tensor]
"""(B, 3, h, w) normalised pixels to (B, C, h, w) logits."""


@dataclass(frozen=True)
class Views:
    """How an image is presented to the network.

    By default (``window=None``) an image is seen in sliding windows if it has more than `MAX_WHOLE` pixels, or if the
    model was trained to be evaluated in windows.

    Attributes:
        window: sliding windows of the size of training crops, or the whole image.
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
    """The evaluation protocol of a segmenter."""

    size: tuple[int, int]  # (H, W) of training crops, of sliding windows and of exported files with a fixed size
    img_size: int | None  # shorter side that images are resized to; None for their own
    window: bool  # whether images are seen in sliding windows
    mean: tuple[float, ...]  # per channel, for pixels from 0 to 1
    std: tuple[float, ...]

    @classmethod
    def of(cls, info: ModelInfo) -> "SegmentPreprocess":
        """The protocol of a model."""
        given = info.preprocess
        height, width = given["size"]
        return cls((height, width), given["img_size"], given["window"], tuple(given["mean"]), tuple(given["std"]))

    def transform(self) -> SegmentationEvalTransform:
        """The transform from images to pixels of the same size; `segment_pixels` does the resizing."""
        return SegmentationEvalTransform(mean=self.mean, std=self.std)


@torch.inference_mode()
def segment_pixels(
    network: Network,
    pixels: Tensor,
    num_classes: int,
    preprocess: SegmentPreprocess,
    views: Views | None = None,
    *,
    fixed: bool = False,
) -> Tensor:
    """The most probable class of every pixel, (H, W), of an image's (3, H, W) normalised pixels in its own size.

    The image, or each window of it, is resized for the network, and the logits are resized back. With several views,
    probabilities are averaged.

    Args:
        network: scores pixels.
        pixels: of the image.
        num_classes: number of classes of ``network``.
        preprocess: the usual way to present an image.
        views: what to change about that.
        fixed: whether the network takes images of ``preprocess.size`` alone. Then the image is seen in windows, padded
            if it is smaller.

    Raises:
        ValueError: several scales for a network of a fixed size.
    """
    views = views or Views()
    if fixed and views.scales != (1.0,):
        raise ValueError("several scales need a network for images of any size: export it with --dynamic batch,hw")
    height, width = pixels.shape[-2:]
    img_size = preprocess.img_size if views.img_size is None else views.img_size
    ratio = img_size / min(height, width) if img_size else 1.0
    windows = views.window
    if windows is None:
        windows = preprocess.window or height * width * ratio**2 > MAX_WHOLE
    if fixed or windows:
        height, width = (_scaled(side, 1 / ratio) for side in preprocess.size)

    def run(part: Tensor) -> Tensor:
        found = []
        for scale in views.scales:
            size: Any = preprocess.size if fixed else tuple(_scaled(side, ratio * scale) for side in part.shape[-2:])
            seen = part
            if size != part.shape[-2:]:
                seen = F.interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True)
            found.append(network(seen))
            if views.flip:
                found.append(network(seen.flip(-1)).flip(-1))
        if len(found) == 1:
            return found[0]
        common = found[0].shape[-2:]
        resized = (logits if logits.shape[-2:] == common else resize(logits, common) for logits in found)
        return torch.stack([logits.float().softmax(1) for logits in resized]).mean(0).log()

    return sliding_window(run, pixels, num_classes, (height, width), fixed_size=fixed)[0]


def _scaled(side: int, factor: float) -> int:
    return max(round(side * factor), 1)


@dataclass(frozen=True)
class Segmentation:
    """The classes of the pixels of one image.

    Attributes:
        labels: (H, W) uint8 or int16, indices of `names`.
        mask_classes: names of the classes, and their values and colours in masks.
    """

    labels: np.ndarray
    mask_classes: MaskClasses

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.mask_classes.names

    def shares(self) -> dict[str, float]:
        """The part of the image that each class covers, the largest first; classes that it does not show are absent."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        return {self.names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}

    def index_image(self) -> Image.Image:
        """The index mask, with the values of the training data's masks."""
        return self.mask_classes.index_image(self.labels)

    def color_image(self) -> Image.Image:
        """The mask in the colours of the classes."""
        return self.mask_classes.paint(self.labels)

    def overlay(self, image: Image.Image, opacity: float = 0.55) -> Image.Image:
        """``image``, which has the size of the labels, under the colours of the classes."""
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

    def iter_predict(
        self, images: Sequence[ImageSource], views: Views | None = None, *, skip_broken: bool = False
    ) -> Iterator[Any]:
        """The `Segmentation` of each image, one at a time; ``views`` says how images are presented to the network."""
        label = partial(self._label, views=views or Views())
        return self._iterate(images, 1, skip_broken, lambda image: image, label)

    def _label(self, images: list[Image.Image], views: Views) -> list[Segmentation]:
        return [Segmentation(self.label(image, views), self.mask_classes) for image in images]

    def label(self, image: Image.Image, views: Views) -> np.ndarray:
        """(H, W) labels of an RGB image."""
        pixels = self.preprocess.transform().image(image).to(self.device)
        fixed = isinstance(self.runtime, Exported) and "hw" not in self.runtime.artifact.dynamic
        labels = segment_pixels(self.runtime, pixels, len(self.classes), self.preprocess, views, fixed=fixed)
        return labels.cpu().numpy()


def mask_classes(info: ModelInfo) -> MaskClasses:
    """What the classes of a model are in masks, from its ``task_args``."""
    fields: dict[str, Any] = dict(info.task_args["masks"])
    for name in ("values", "ignored"):
        fields[name] = tuple(fields[name])
    for name in ("colors", "ignored_colors"):
        fields[name] = tuple(map(tuple, fields[name]))
    return MaskClasses(tuple(info.classes), **fields)


def mask_args(meaning: MaskClasses) -> dict[str, Any]:
    """The entry of ``task_args`` that `mask_classes` reads."""
    return {name: value for name, value in asdict(meaning).items() if name != "names"}
