"""Reading and writing models."""

from .convert import Conversion, convert, save_released
from .model_file import (
    BEST,
    WEIGHT_SOURCES,
    ModelInfo,
    find_model_file,
    load_model,
    own_args,
    read_model_file,
    save_model,
)
from .publish import push_model
from .weights import Weights, identify_model, read_weights

__all__ = [
    "BEST",
    "WEIGHT_SOURCES",
    "Conversion",
    "ModelInfo",
    "Weights",
    "convert",
    "find_model_file",
    "identify_model",
    "load_model",
    "own_args",
    "push_model",
    "read_model_file",
    "read_weights",
    "save_model",
    "save_released",
]
