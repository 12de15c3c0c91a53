"""Building blocks of the network: convolutional blocks, multi-scale attention, stochastic depth, recomputation."""

from .attention import LinearAttention, MultiScaleAttention
from .conv import ConvNormAct, ConvPair, DSConv, FusedMBConv, MBConv, Residual
from .drop_path import DropPath, set_drop_path
from .recompute import recompute, recompute_activations

__all__ = [
    "ConvNormAct",
    "ConvPair",
    "DSConv",
    "DropPath",
    "FusedMBConv",
    "LinearAttention",
    "MBConv",
    "MultiScaleAttention",
    "Residual",
    "recompute",
    "recompute_activations",
    "set_drop_path",
]
