"""Training in less memory: activations are computed again in the backward pass instead of being kept for it.

Autograd keeps the input of every operation whose derivative needs it. In ``conv -> norm -> act -> conv`` these are the
map between each two of them. Norm and activation are cheap to compute, so it is enough to keep what convolutions give.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from .attention import MultiScaleAttention
from .conv import ConvNormAct, ConvPair, DSConv, FusedMBConv, MBConv

BLOCKS = (MultiScaleAttention, DSConv, ConvPair, MBConv, FusedMBConv, ConvNormAct)
"""What is computed again as a whole; such a block within another one belongs to that."""

# Hooks around a block, such as those that count or move what is kept, see it only with this, which PyTorch 2.8 has not.
_OPTIONS: dict[str, Any] = {
    name: True for name in ("respect_saved_tensors_hooks",) if name in inspect.signature(checkpoint).parameters
}


def recompute_activations(model: nn.Module) -> None:
    """Let the `BLOCKS` of ``model`` keep their input and the outputs of their convolutions alone, and compute what else
    the backward pass needs from these.

    Outputs, gradients, statistics and state dict stay the same. Forward hooks within a block are called twice. Within
    `recompute`, which keeps less still, the outputs of convolutions are kept nevertheless: use one of the two.
    """
    for block in _outermost_blocks(model):
        block.forward = partial(_run_block, block, block.forward)


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), which keeps x alone: everything else is computed again in the backward pass."""
    if torch.compiler.is_compiling():  # a compiler cannot trace our context, and updates statistics once by itself
        return checkpoint(module, x, use_reentrant=False)
    return _checkpointed(module, module, noop_context_fn, x)


def _run_block(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler decides itself what is cheap to compute again
        return forward(x)
    return _checkpointed(block, forward, _keep_convolutions, x)


def _keep_convolutions() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])


def _outermost_blocks(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, BLOCKS):
        yield model
    else:
        for child in model.children():
            yield from _outermost_blocks(child)


def _checkpointed(
    module: nn.Module, forward: Callable[[Tensor], Tensor], contexts: Callable[[], tuple[Any, Any]], x: Tensor
) -> Tensor:
    """forward(x) of ``module``; ``contexts`` are for the forward pass and its repetition."""

    def with_frozen_statistics() -> tuple[Any, Any]:
        first, repetition = contexts()
        return first, _frozen_statistics(module, repetition)

    return checkpoint(forward, x, use_reentrant=False, context_fn=with_frozen_statistics, **_OPTIONS)


@contextmanager
def _frozen_statistics(module: nn.Module, repetition: Any) -> Iterator[None]:
    """Within ``repetition``, the BatchNorms in ``module`` leave their running statistics alone: they run for the second
    time, and have counted this batch.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with repetition:
            yield
    finally:  # checkpointing leaves by an exception once it has what it needs
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
