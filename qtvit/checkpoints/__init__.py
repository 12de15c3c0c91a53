"""Reading and writing models."""

from .model_file import BEST, WEIGHT_SOURCES, ModelInfo, load_model, own_args, read_model_file, save_model
from .weights import identify_model, read_weights

__all__ = [
    "BEST",
    "WEIGHT_SOURCES",
    "ModelInfo",
    "identify_model",
    "load_model",
    "own_args",
    "read_model_file",
    "read_weights",
    "save_model",
]
