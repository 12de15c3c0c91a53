"""From an image to the network's input in training: augmentation as the published recipes have it."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RandomResizedCropAndInterpolation
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from qtvit.errors import unknown_name

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""What the interpolation "random" is drawn from, with equal odds."""

_NUMBER = r"\d+(\.\d+)?"
_AUTO_AUGMENT = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(v0r?|originalr?|3a)(-mstd{_NUMBER})?"
)
"""timm's strings; timm itself passes over sections that it does not know."""


class TrainTransform:
    """PIL RGB image -> (3, H, W) fp32: crop, flips, RandAugment or colour jitter, normalisation, erasing.

    Made of timm's and torchvision's transforms, in timm's order. Random numbers come from the global generators of
    Python, NumPy and torch. The defaults are what all published recipes share.

    Args:
        size: (H, W) of the result.
        scale: smallest and largest part of the image's area in the crop.
        ratio: smallest and largest aspect ratio of the crop.
        hflip, vflip: probabilities of a horizontal and a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter, 0 for none. As in timm without effect
            beside auto_augment, other than 3-Augment.
        auto_augment: timm's string, such as rand-n1-m3-mstd1.0-inc1. What an operation brings into view has the mean
            colour; shifts go up to 0.45 of the side that they run along; all interpolate bicubically.
        interpolation: of the crop's resize, one of `INTERPOLATIONS`, or "random" for a new one for each image.
        random_erasing: probability of setting one rectangle to 0, which after normalisation is the mean colour.
        mean, std: per channel, for pixels from 0 to 1.

    Raises:
        ValueError: an unknown interpolation, or a string that is not one of timm's.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        interpolation: str = "random",
        random_erasing: float = 0.0,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if interpolation not in (*INTERPOLATIONS, "random"):
            raise unknown_name("interpolation", interpolation, [*INTERPOLATIONS, "random"])
        crop = RandomResizedCropAndInterpolation(size, scale, ratio, interpolation)
        if interpolation == "random":  # of timm, bilinear or bicubic
            crop.interpolation = tuple(map(str_to_interp_mode, INTERPOLATIONS))
        steps: list[Callable[[Any], Any]] = [crop]
        if hflip > 0:
            steps.append(transforms.RandomHorizontalFlip(hflip))
        if vflip > 0:
            steps.append(transforms.RandomVerticalFlip(vflip))
        if auto_augment is not None:
            steps.append(_auto_augment(auto_augment, mean))
        if color_jitter > 0 and (auto_augment is None or "3a" in auto_augment):
            steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
        self.augment = transforms.Compose(steps)
        self.mean = np.array(mean, dtype=np.float32)[:, None, None]
        self.std = np.array(std, dtype=np.float32)[:, None, None]
        self.erase = RandomErasing(random_erasing, device="cpu") if random_erasing > 0 else None

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(self.augment(image)).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= self.mean
        pixels /= self.std
        normalized = torch.from_numpy(pixels)
        return normalized if self.erase is None else self.erase(normalized)


def _auto_augment(text: str, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    if not _AUTO_AUGMENT.fullmatch(text):
        raise ValueError(
            f"--augment.auto-augment {text!r} is not one of timm's: expected such as rand-n2-m9-mstd0.5-inc1, "
            "augmix-m3-w3, original, originalr, v0, v0r or 3a"
        )
    policy = text.split("-")[0]
    settings = {
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
        "translate_pct": 0.3 if policy == "augmix" else 0.45,
    }
    build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(policy, auto_augment_transform)
    augment = build(text, settings)
    for op in augment.ops if hasattr(augment, "ops") else itertools.chain(*augment.policy):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At the end of its range timm asks for 0 bits, which is black; PIL 13 refuses that, mid-training."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))
