"""Linear attention as pure functions on tensors; README.md beside this file derives it."""

from .attention import attention_weights, get_kernel, linear_attention, linear_attention_cf, masked_softmax_attention_cf
from .kernels import EPS, KERNELS, Kernel
from .reference import reference_attention

__all__ = [
    "EPS",
    "KERNELS",
    "Kernel",
    "attention_weights",
    "get_kernel",
    "linear_attention",
    "linear_attention_cf",
    "masked_softmax_attention_cf",
    "reference_attention",
]
