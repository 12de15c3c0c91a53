"""The moving average of a model's weights that the recipe evaluates and publishes."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


class MovingAverage(AveragedModel):
    """Exponential moving average of the weights and buffers of a model; calling it calls the averaged model.

    It begins as a copy of ``model``. After the optimizer's step t = 1, 2, …, ``update_parameters(model)`` makes it
    ``d · average + (1 - d) · model`` with ``d = decay · (1 - exp(-t / warmup_steps))``; integer buffers are copied.
    It never trains: evaluation mode whatever the module around it does, no gradients. Its state dict has the count of
    updates, so that it continues to the bit.

    timm's ModelEmaV3 has another warm-up and leaves the count to its caller; Lightning's callback exchanges the weights
    of the one model around evaluation, but MESA needs both in a training step.

    Args:
        model: what to average; it is copied.
        decay: in [0, 1).
        warmup_steps: time constant of the warm-up, in optimizer steps; 0 for none.

    Raises:
        ValueError: ``decay`` or ``warmup_steps`` out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9998, warmup_steps: float = 4000) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        if not 0 <= warmup_steps < math.inf:
            raise ValueError(f"warmup_steps must be a number of steps, 0 or more, got {warmup_steps}")
        average = partial(_average, decay=decay, warmup_steps=warmup_steps)
        super().__init__(model, multi_avg_fn=average, use_buffers=True)
        self.n_averaged.fill_(1)  # the copy counts as the first model; at 0, the first update would only copy
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stay in evaluation mode."""
        return super().train(False)


def _average(averages: Tensors, tensors: Tensors, step: Tensor | int, *, decay: float, warmup_steps: float) -> None:
    """Update ``averages``, tensors of one device and dtype, in place at the ``step``-th update, counted from 1."""
    if not averages[0].is_floating_point():
        torch._foreach_copy_(averages, tensors)
        return
    if warmup_steps > 0:
        decay *= -math.expm1(-int(step) / warmup_steps)
    torch._foreach_lerp_(averages, tensors, 1 - decay)
