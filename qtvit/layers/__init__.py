"""Building blocks of the network: convolutional blocks and multi-scale Taylor attention."""

from .attention import MultiScaleAttention
from .conv import ConvNormAct, ConvPair, DSConv, FusedMBConv, MBConv, Residual
from .lean import recompute

__all__ = ["ConvNormAct", "ConvPair", "DSConv", "FusedMBConv", "MBConv", "MultiScaleAttention", "Residual", "recompute"]
