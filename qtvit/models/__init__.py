"""The network and its variants; importing this registers them with timm."""

from .build import ModelCost, build_model, build_task_model, check_img_size, model_cost
from .qtvit import ARCHITECTURES, PUBLISHED_ACCURACY, SHIPPED_WEIGHTS, Architecture, QTViT, Stage

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED_ACCURACY",
    "SHIPPED_WEIGHTS",
    "Architecture",
    "ModelCost",
    "QTViT",
    "Stage",
    "build_model",
    "build_task_model",
    "check_img_size",
    "model_cost",
]
