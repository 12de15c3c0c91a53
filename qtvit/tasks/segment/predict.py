"""From pictures to a class for each pixel."""

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
"""Pixels, as the network sees them, up to which an image is given to it whole unless windows are asked for."""

Network = Callable[[Tensor], Tensor]
"""(B, 3, h, w) normalised pixels to (B, C, h, w) logits."""


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

    def transform(self) -> SegmentationEvalTransform:
        """From pictures to pixels, in the pictures' own size; `segment_pixels` resizes."""
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
    """The best class of every pixel, (H, W), of (3, H, W) normalised pixels of an image in its own size.

    The image, or each window, is resized for the network, and the logits back to its own pixels. With several views,
    probabilities are averaged.

    Args:
        network: what scores pixels.
        pixels: of the image.
        num_classes: that ``network`` tells apart.
        preprocess: the usual way to look at an image.
        views: another way.
        fixed: the network takes images of ``preprocess.size`` alone: the image is seen in windows, padded if it is
            smaller.

    Raises:
        ValueError: several scales for a network of a fixed size.
    """
    views = views or Views()
    if fixed and views.scales != (1.0,):
        raise ValueError("several scales need a network for images of any size: export it with --dynamic batch,hw")
    height, width = pixels.shape[-2:]
    img_size = preprocess.img_size if views.img_size is None else views.img_size
    ratio = img_size / min(height, width) if img_size else 1.0
    window = preprocess.size if fixed or _in_windows(views, preprocess, height * width * ratio**2) else None
    tile = (height, width) if window is None else (_scaled(window[0], 1 / ratio), _scaled(window[1], 1 / ratio))

    def run(part: Tensor) -> Tensor:
        found = []
        for scale in views.scales:
            size = window if fixed else tuple(_scaled(side, ratio * scale) for side in part.shape[-2:])
            seen = part if size == part.shape[-2:] else _resize(part, size)
            found.append(network(seen))
            if views.flip:
                found.append(network(seen.flip(-1)).flip(-1))
        if len(found) == 1:
            return found[0]
        common = found[0].shape[-2:]
        resized = (logits if logits.shape[-2:] == common else resize(logits, common) for logits in found)
        return torch.stack([logits.float().softmax(1) for logits in resized]).mean(0).log()

    return sliding_window(run, pixels, num_classes, tile, fixed_size=fixed)[0]


def _in_windows(views: Views, preprocess: SegmentPreprocess, num_pixels: float) -> bool:
    """Whether an image of so many pixels, as the network sees it, is seen in windows."""
    return views.window if views.window is not None else preprocess.window or num_pixels > MAX_WHOLE


def _scaled(side: int, factor: float) -> int:
    return max(round(side * factor), 1)


def _resize(pixels: Tensor, size: Any) -> Tensor:
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)


@dataclass(frozen=True)
class Segmentation:
    """The classes of the pixels of one image.

    Attributes:
        labels: (H, W) uint8 or int16, indices of `names`.
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

    def iter_predict(
        self, images: Sequence[ImageSource], views: Views | None = None, *, skip_broken: bool = False
    ) -> Iterator[Any]:
        """The classes of the pixels of each image, looked at as ``views`` say, a `Segmentation` at a time."""
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
    """What the classes of a model are in masks."""
    fields: dict[str, Any] = dict(info.task_args["masks"])
    for name in ("values", "ignored"):
        fields[name] = tuple(fields[name])
    for name in ("colors", "ignored_colors"):
        fields[name] = tuple(map(tuple, fields[name]))
    return MaskClasses(tuple(info.classes), **fields)


def mask_args(meaning: MaskClasses) -> dict[str, Any]:
    """What `mask_classes` reads from ``task_args``."""
    fields = asdict(meaning)
    del fields["names"]
    return fields
