"""From an image to the network's input, the same in training's evaluation, in `qtvit eval` and in prediction."""

import math
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf


@dataclass(frozen=True)
class Preprocess:
    """The evaluation protocol: resize so that ``size / crop_pct`` is covered, centre crop, normalise.

    Attributes:
        size: (H, W) of the network's input.
        crop_pct: the part of the resized image's shorter side that is kept.
        interpolation: name of a ``torchvision.transforms.InterpolationMode``.
        mean, std: per channel, for pixels from 0 to 1.
    """

    size: tuple[int, int]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def transform(self) -> "EvalTransform":
        return EvalTransform(self)


class EvalTransform(nn.Module):
    """PIL RGB image -> (3, H, W) fp32."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.size = preprocess.size
        self.crop_pct = preprocess.crop_pct
        self.interpolation = InterpolationMode(preprocess.interpolation)
        self.normalize = v2.Normalize(list(preprocess.mean), list(preprocess.std))

    def forward(self, image: Image.Image) -> Tensor:
        cover_h, cover_w = (math.ceil(side / self.crop_pct) for side in self.size)
        if cover_h * image.width >= cover_w * image.height:  # the height is what has to be covered
            resized = [cover_h, max(cover_w, int(cover_h * image.width / image.height))]
        else:
            resized = [max(cover_h, int(cover_w * image.height / image.width)), cover_w]
        image = tvf.center_crop(tvf.resize(image, resized, self.interpolation), list(self.size))
        return self.normalize(tvf.to_dtype(tvf.to_image(image), torch.float32, scale=True))
