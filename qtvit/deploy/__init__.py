"""Using a trained model."""

from .detections import Detections, DetectPredictor
from .fuse import fuse
from .predictor import ClassPredictor, Prediction, Predictor

__all__ = ["ClassPredictor", "DetectPredictor", "Detections", "Prediction", "Predictor", "fuse"]
