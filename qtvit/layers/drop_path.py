"""Stochastic depth, "Deep Networks with Stochastic Depth", Huang et al., ECCV 2016."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes a residual branch for some samples in training and divides the others by what is kept: (B, C, H, W).

    timm's does the same, but has its probability as a Python number, so that a compiled graph is made anew whenever it
    changes. Here it is a tensor, the buffer ``drop_prob``, which `set_drop_path` changes in place.

    Args:
        rate: probability that a sample is dropped, in [0, 1).
    """

    drop_prob: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("drop_prob", torch.tensor(rate, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """The probability of the full rate, for a module that comes from the meta device; timm's name for it."""
        self.drop_prob.fill_(self.rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand_like(x[:, :1, :1, :1], dtype=torch.float32) >= self.drop_prob
        return x * (kept / (1 - self.drop_prob)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


@torch.no_grad()
def set_drop_path(model: nn.Module, progress: float) -> None:
    """Let every `DropPath` in ``model`` drop with ``progress``, 0 to 1, times its rate. timm's own are left alone."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob.fill_(module.rate * progress)
