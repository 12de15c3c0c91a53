"""From an image and its labels to the network's input, in training and in evaluation."""

from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

Sides = tuple[int, int]
Range = tuple[float, float]

NUM_TRIES = 10
"""Crops that are drawn at most until no class covers more than the largest accepted part."""


class SegmentationTrainTransform:
    """PIL RGB image and (H, W) labels -> (3, H, W) fp32 and (H, W) int64: scale, crop, flip, colours, normalisation.

    This is the augmentation that segmentation recipes share, with torchvision's transforms. Random numbers come from
    torch's global generator.

    Args:
        crop_size: (H, W) of the result.
        base_size: shorter side, in pixels, of an image at scale 1; None for the shorter side of ``crop_size``, 0 for
            the image's own.
        scale: smallest and largest scale, drawn uniformly.
        hflip: probability of a horizontal flip.
        max_class_ratio: crops in which one class covers more than this part are drawn again, up to `NUM_TRIES` times; 1
            accepts all.
        photometric: whether to change brightness, contrast, saturation and hue, each with probability ½, within the
            default ranges of torchvision's ``RandomPhotometricDistort``.
        ignore_index: the label of pixels without a class, and of those where a crop reaches beyond the image.
        mean, std: per channel, for pixels from 0 to 1.
    """

    def __init__(
        self,
        crop_size: Sides,
        *,
        base_size: int | None = None,
        scale: Range = (0.5, 2.0),
        hflip: float = 0.5,
        max_class_ratio: float = 0.75,
        photometric: bool = True,
        ignore_index: int = 255,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        fill = [round(255 * value) for value in mean]
        base = min(crop_size) if base_size is None else base_size
        steps: list[v2.Transform] = [RandomScaledCrop(crop_size, base, scale, max_class_ratio, fill, ignore_index)]
        if hflip > 0:
            steps.append(v2.RandomHorizontalFlip(hflip))
        if photometric:
            steps += [
                v2.RandomApply([v2.ColorJitter(**{name: strength})], p=0.5)
                for name, strength in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.05))
            ]
        steps += [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(mean, std)]
        self.augment = v2.Compose(steps)

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, Tensor]:
        pixels, mask = self.augment(tv_tensors.Image(tvf.pil_to_tensor(image)), tv_tensors.Mask(labels))
        return pixels.as_subclass(Tensor), mask.as_subclass(Tensor).long()


class RandomScaledCrop(v2.Transform):
    """A crop of the randomly scaled image; where the scaled image is smaller, it is padded at the right and bottom.

    Only what the crop shows is resized: images with antialiased bilinear interpolation, labels with the nearest value.

    Args:
        size: (H, W) of the crop.
        base_size: shorter side of an image at scale 1; 0 for its own.
        scale, max_class_ratio: see `SegmentationTrainTransform`.
        fill, ignore_index: colour and label of the padding.
    """

    def __init__(
        self, size: Sides, base_size: int, scale: Range, max_class_ratio: float, fill: list[int], ignore_index: int
    ) -> None:
        super().__init__()
        self.size = size
        self.base_size = base_size
        self.scale = scale
        self.max_class_ratio = max_class_ratio
        self.fill = fill
        self.ignore_index = ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Position and size of the part that is shown, in the image's own pixels, and its size in the crop."""
        image, labels = flat_inputs
        sides = image.shape[-2:]
        ratio = float(torch.empty(()).uniform_(*self.scale))
        if self.base_size:
            ratio *= self.base_size / min(sides)
        shown = [min(max(round(s * ratio), 1), c) for s, c in zip(sides, self.size, strict=True)]
        box = [
            min(max(round(part / ratio), 1), side) if part < side * ratio else side
            for part, side in zip(shown, sides, strict=True)
        ]
        for _ in range(NUM_TRIES):
            top, left = (int(torch.randint(s - b + 1, ())) for s, b in zip(sides, box, strict=True))
            if self.max_class_ratio >= 1 or self._is_mixed(labels[top : top + box[0], left : left + box[1]]):
                break
        return {"top": top, "left": left, "height": box[0], "width": box[1], "size": shown}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop, resize and pad an image or its labels."""
        bottom, right = (full - part for full, part in zip(self.size, params["size"], strict=True))
        if not isinstance(inpt, tv_tensors.Mask):
            shown = tvf.resized_crop(inpt, **params, interpolation=InterpolationMode.BILINEAR, antialias=True)
            return tvf.pad(shown, [0, 0, right, bottom], fill=self.fill)
        # By default, torchvision samples masks at the corner of each new pixel; images are sampled at its centre.
        labels = inpt.as_subclass(Tensor)[None]
        labels = tvf.resized_crop(labels, **params, interpolation=InterpolationMode.NEAREST_EXACT)[0]
        return tv_tensors.Mask(F.pad(labels, (0, right, 0, bottom), value=self.ignore_index))

    def _is_mixed(self, labels: Tensor) -> bool:
        counts = labels[labels != self.ignore_index].unique(return_counts=True)[1]
        return len(counts) > 1 and float(counts.max()) <= self.max_class_ratio * float(counts.sum())


class SegmentationEvalTransform:
    """PIL RGB image and (H, W) labels -> (3, H, W) fp32 and (H, W) int64, normalised and in the image's own size.

    Args:
        mean, std: per channel, for pixels from 0 to 1.
    """

    def __init__(
        self, *, mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN, std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    ) -> None:
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, image: Image.Image, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), labels.long()

    def image(self, image: Image.Image) -> Tensor:
        """The (3, H, W) pixels of an image alone."""
        pixels = tvf.to_dtype(tvf.pil_to_tensor(image), torch.float32, scale=True)
        return tvf.normalize(pixels, self.mean, self.std)
