"""Building blocks of the network: convolutional blocks and multi-scale Taylor attention."""

from .attention import LinearAttention, MultiScaleAttention
from .conv import ConvNormAct, ConvPair, DSConv, FusedMBConv, MBConv, Residual
from .drop_path import DropPath, set_drop_path
from .lean import recompute, set_recompute_activations

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
    "set_drop_path",
    "set_recompute_activations",
]
