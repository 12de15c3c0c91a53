"""The network, its variants and dense-prediction models on it; importing this registers the variants with timm."""

from .architectures import ARCHITECTURES, PUBLISHED_ACCURACY, Architecture, Stage
from .backbone import load_backbone
from .build import ModelCost, build_model, check_img_size, model_cost
from .detection import Detector, build_detector
from .qtvit import SHIPPED_WEIGHTS, QTViT
from .tasks import build_task_model

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED_ACCURACY",
    "SHIPPED_WEIGHTS",
    "Architecture",
    "Detector",
    "ModelCost",
    "QTViT",
    "Stage",
    "build_detector",
    "build_model",
    "build_task_model",
    "check_img_size",
    "load_backbone",
    "model_cost",
]
