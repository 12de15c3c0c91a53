"""The network and its variants; importing this registers them with timm."""

from typing import Any

from qtvit import moved

from .architectures import ARCHITECTURES, PUBLISHED_ACCURACY, Architecture, Stage
from .backbone import load_backbone
from .build import ModelCost, build_model, check_img_size, model_cost
from .qtvit import SHIPPED_WEIGHTS, QTViT

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED_ACCURACY",
    "SHIPPED_WEIGHTS",
    "Architecture",
    "ModelCost",
    "QTViT",
    "Stage",
    "build_model",
    "check_img_size",
    "load_backbone",
    "model_cost",
]


def __getattr__(name: str) -> Any:
    return moved.find(__name__, name)
