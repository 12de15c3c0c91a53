"""Turning an image into the network's input: the same in evaluation during training, `qtvit eval` and prediction."""

import math
import re
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from qtvit.errors import unknown_name


def parse_size(text: str | int, option: str = "--img-size") -> tuple[int, int]:
    """(H, W) from "224" or "160x256" (height first); anything else is a ValueError that names ``option``."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(text))
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 1:
        raise ValueError(f"{option} must be a side such as 224, or HEIGHTxWIDTH such as 160x256, got {text!r}")
    return size


@dataclass(frozen=True)
class Preprocess:
    """The evaluation protocol: resize to cover ``size / crop_pct``, crop the centre, normalise.

    Attributes:
        size: (H, W) of the network's input.
        crop_pct: fraction of the resized image's shorter side that is kept.
        interpolation: name of a ``PIL.Image.Resampling``, in lower case.
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
    """PIL RGB image -> (3, H, W) fp32.

    Only the part of the image that the crop shows is resized: resizing a whole panorama would make an enormous image.
    The pixels are the same, because PIL's filters look beyond the box they are given. Columns are resized before rows,
    as PIL did before version 13, which turned the order round for tall images.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.size = preprocess.size
        self.crop_pct = preprocess.crop_pct
        known = {mode.name.lower(): mode for mode in Image.Resampling}
        if preprocess.interpolation not in known:
            raise unknown_name("interpolation", preprocess.interpolation, known)
        self.interpolation = known[preprocess.interpolation]
        self.normalize = v2.Normalize(list(preprocess.mean), list(preprocess.std))

    def forward(self, image: Image.Image) -> Tensor:
        height, width = self.size
        left, top, right, bottom = self.crop_box(image.width, image.height)
        margin = 1 + 3 * max((bottom - top) / height, 1)  # Lanczos, the widest filter, reaches three pixels beyond
        first, last = max(math.floor(top - margin), 0), min(math.ceil(bottom + margin), image.height)
        rows = image.resize((width, last - first), self.interpolation, box=(left, first, right, last))
        image = rows.resize((width, height), self.interpolation, box=(0, top - first, width, bottom - first))
        return self.normalize(tvf.to_dtype(tvf.to_image(image), torch.float32, scale=True))

    def crop_box(self, image_width: int, image_height: int) -> tuple[float, float, float, float]:
        """The part of the image that the network sees: left, top, right and bottom in pixels of the image."""
        height, width = self.size
        cover_h, cover_w = (math.ceil(side / self.crop_pct) for side in self.size)
        if cover_h * image_width >= cover_w * image_height:  # the height is the tighter constraint
            resized_h, resized_w = cover_h, max(cover_w, int(cover_h * image_width / image_height))
        else:
            resized_h, resized_w = max(cover_h, int(cover_w * image_height / image_width)), cover_w
        top, left = round((resized_h - height) / 2), round((resized_w - width) / 2)
        return (
            left * image_width / resized_w,
            top * image_height / resized_h,
            (left + width) * image_width / resized_w,
            (top + height) * image_height / resized_h,
        )
