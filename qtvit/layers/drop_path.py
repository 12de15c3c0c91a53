"""Stochastic depth ("Deep Networks with Stochastic Depth", Huang et al., ECCV 2016)."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero a residual branch (B, C, H, W) for some samples in training; divide the others by the keep probability.

    timm's DropPath does the same with a Python number, so that torch.compile recompiles whenever the probability
    changes. Here the probability is a tensor, the buffer ``drop_prob``, which `set_drop_path` changes in place.

    Args:
        rate: probability that a sample's branch is zeroed, in [0, 1).
    """

    drop_prob: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("drop_prob", torch.tensor(rate, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Set ``drop_prob`` to the full rate, after a module was made on the meta device; the name is timm's."""
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
    """Set every `DropPath` in ``model`` to ``progress`` (0 to 1) times its rate; timm's own are left alone."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob.fill_(module.rate * progress)
