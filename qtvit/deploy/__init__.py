"""Using a trained model."""

from .fuse import fuse
from .predictor import ClassPredictor, Prediction, Predictor

__all__ = ["ClassPredictor", "Prediction", "Predictor", "fuse"]
