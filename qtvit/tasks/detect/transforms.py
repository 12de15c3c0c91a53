"""Augmentation of images together with their boxes and masks."""

import math
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from .data import Target


class DetectionTransform:
    """Distorts, flips and crops or pads a uint8 ``tv_tensors.Image`` and its `Target`.

    It consists of torchvision's v2 transforms. Objects of which nothing is left are dropped. Random numbers come from
    torch's global generator. The image is not resized here: the detector does that, in training to a random one of its
    sizes.

    Args:
        hflip: probability of a horizontal flip.
        photometric: probability of each of SSD's changes of brightness, contrast, saturation, hue and channels.
        zoom: smallest and largest factor by which objects grow, relative to the image; see `RandomZoom`.

    Raises:
        ValueError: a probability is not from 0 to 1, or the factors are not above 0 or not in order.
    """

    def __init__(self, *, hflip: float = 0.5, photometric: float = 0.0, zoom: tuple[float, float] = (1.0, 1.0)) -> None:
        for name, probability in (("hflip", hflip), ("photometric", photometric)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {probability}")
        if not 0 < zoom[0] <= zoom[1]:
            raise ValueError(f"zoom must be two factors above 0, the smaller one first, got {zoom}")
        steps: list[v2.Transform] = []
        if photometric > 0:
            steps.append(v2.RandomPhotometricDistort(p=photometric))
        if hflip > 0:
            steps.append(v2.RandomHorizontalFlip(hflip))
        if zoom != (1.0, 1.0):
            steps.append(RandomZoom(*zoom))
        self.steps = v2.Compose([*steps, v2.SanitizeBoundingBoxes()])

    def __call__(self, image: Any, target: Target) -> tuple[Any, Target]:
        return self.steps(image, target)


class RandomZoom(v2.Transform):
    """Scale jitter for detectors, which resize every image to a given shorter side anyway.

    To make objects larger by a factor, a random part of the image is cut out; to make them smaller, a frame of the mean
    colour is added. So no pixel is interpolated twice. The logarithm of the factor is uniformly distributed.

    Args:
        smallest, largest: range of the factor; 1 leaves the image as it is.
    """

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest = smallest
        self.largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Position and size of the new image, in pixels of the old one."""
        height, width = tvf.get_size(next(x for x in flat_inputs if isinstance(x, tv_tensors.Image)))
        power, down, right = torch.rand(3).tolist()
        factor = math.exp(math.log(self.smallest) + power * math.log(self.largest / self.smallest))
        new_height, new_width = (max(round(side / factor), 1) for side in (height, width))
        top, left = math.floor(down * (height - new_height) + 0.5), math.floor(right * (width - new_width) + 0.5)
        return {"top": top, "left": left, "height": new_height, "width": new_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop; where the new image reaches beyond the old one, it is padded."""
        if not isinstance(inpt, tv_tensors.Image):
            return self._call_kernel(tvf.crop, inpt, **params)
        top, left, height, width = (params[key] for key in ("top", "left", "height", "width"))
        if height <= inpt.shape[-2] and width <= inpt.shape[-1]:
            return tvf.crop(inpt, **params)
        right, bottom = width + left - inpt.shape[-1], height + top - inpt.shape[-2]
        return tvf.pad(inpt, [-left, -top, right, bottom], fill=[255 * value for value in IMAGENET_DEFAULT_MEAN])
