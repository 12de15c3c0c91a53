"""Using a trained model."""

from .predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
