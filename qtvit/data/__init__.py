"""Reading images and labels, and turning them into the network's input."""

from typing import Any

from qtvit import moved

from .folders import DIGITS
from .images import ImageSource, find_images, open_image
from .names import class_names
from .preprocess import EvalTransform, Preprocess
from .problems import ProblemReport
from .shards import PackedImage

__all__ = [
    "DIGITS",
    "EvalTransform",
    "ImageSource",
    "PackedImage",
    "Preprocess",
    "ProblemReport",
    "class_names",
    "find_images",
    "open_image",
]


def __getattr__(name: str) -> Any:
    return moved.find(__name__, name)
