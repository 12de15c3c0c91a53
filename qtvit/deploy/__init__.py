"""Using a trained model."""

from typing import Any

from qtvit import moved

from .fuse import fuse
from .predictor import Predictor

__all__ = ["Predictor", "fuse"]


def __getattr__(name: str) -> Any:
    return moved.find(__name__, name)
