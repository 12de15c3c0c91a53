"""Using a trained model."""

from .fuse import fuse
from .predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "fuse"]
