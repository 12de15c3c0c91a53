"""Linear attention as pure functions on tensors; README.md beside this file derives it."""

from .attention import get_kernel, linear_attention, linear_attention_cf
from .kernels import EPS, KERNELS, Kernel
from .reference import reference_attention

__all__ = ["EPS", "KERNELS", "Kernel", "get_kernel", "linear_attention", "linear_attention_cf", "reference_attention"]
