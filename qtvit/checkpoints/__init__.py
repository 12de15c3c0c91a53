"""Reading and writing models."""

from .model_file import BEST, ModelInfo, load_model, read_model_file, save_model

__all__ = ["BEST", "ModelInfo", "load_model", "read_model_file", "save_model"]
