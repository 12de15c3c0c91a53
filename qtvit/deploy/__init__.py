"""Using a trained model."""

from .detections import Detections, DetectPredictor
from .fuse import fuse
from .predictor import ClassPredictor, Prediction, Predictor
from .segment import Segmentation, SegmentPredictor, Views

__all__ = [
    "ClassPredictor",
    "DetectPredictor",
    "Detections",
    "Prediction",
    "Predictor",
    "SegmentPredictor",
    "Segmentation",
    "Views",
    "fuse",
]
