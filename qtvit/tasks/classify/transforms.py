"""Augmentation and normalisation of training images, as in the published recipes."""

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
"""The interpolations from which "random" draws, with equal probability."""

_NUMBER = r"\d+(\.\d+)?"
_AUTO_AUGMENT = re.compile(
    rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(v0r?|originalr?|3a)(-mstd{_NUMBER})?"
)
"""The strings that timm understands; timm itself silently ignores sections that it does not know."""


class TrainTransform:
    """PIL RGB image -> (3, H, W) fp32: crop, flips, RandAugment or colour jitter, normalisation, erasing.

    The steps are timm's and torchvision's transforms, in timm's order. They draw from the global random generators of
    Python, NumPy and torch. The defaults are what all published recipes share.

    Args:
        size: (H, W) of the result.
        scale: smallest and largest area of the crop, as parts of the image's area.
        ratio: smallest and largest aspect ratio of the crop.
        hflip, vflip: probabilities of a horizontal and a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter, 0 for none. As in timm, it has no effect
            with auto_augment, except with 3-Augment.
        auto_augment: timm's string, such as rand-n1-m3-mstd1.0-inc1. All operations interpolate bicubically and fill
            new areas with the mean colour; translations go up to 0.45 of the side (augmix: 0.3).
        interpolation: one of `INTERPOLATIONS` for the crop's resize, or "random" to draw one for each image.
        random_erasing: probability of setting one rectangle to 0, which is the mean colour after normalisation.
        mean, std: normalisation per channel, for pixels from 0 to 1.

    Raises:
        ValueError: the interpolation is unknown, or ``auto_augment`` is not one of timm's strings.
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
        if interpolation == "random":  # timm draws from bilinear and bicubic only
            crop.interpolation = tuple(map(str_to_interp_mode, INTERPOLATIONS))
        steps: list[Callable[[Any], Any]] = [crop]
        for flip, p in ((transforms.RandomHorizontalFlip, hflip), (transforms.RandomVerticalFlip, vflip)):
            if p > 0:
                steps.append(flip(p))
        if auto_augment is not None:
            steps.append(_auto_augment(auto_augment, mean))
        if color_jitter > 0 and (auto_augment is None or "3a" in auto_augment):
            steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
        self.augment = transforms.Compose(steps)
        self.mean, self.std = np.array([mean, std], dtype=np.float32)[..., None, None]
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
    """Posterize, but black for the 0 bits that timm can draw; PIL 13 raises an error for them, in mid-training."""
    return ImageOps.posterize(image, min(bits, 8)) if bits >= 1 else Image.new(image.mode, image.size)
