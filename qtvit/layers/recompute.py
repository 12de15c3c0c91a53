"""Training in less memory: activations are recomputed in the backward pass instead of being kept for it.

Autograd keeps the input of every operation whose derivative needs it. In ``conv -> norm -> act -> conv`` these are all
the feature maps in between. Norm and activation are cheap to recompute, so it is enough to keep the convolutions'
outputs.
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
"""Types of the blocks that are recomputed as a whole; a block within another one is part of the outer one."""

# Only with this option do saved-tensor hooks around a block, such as those that count or offload the tensors kept for
# the backward pass, see the block's tensors. PyTorch 2.8 does not have it.
_OPTIONS: dict[str, Any] = {
    name: True for name in ("respect_saved_tensors_hooks",) if name in inspect.signature(checkpoint).parameters
}


def recompute_activations(model: nn.Module) -> None:
    """Make the `BLOCKS` of ``model`` keep only their input and their convolutions' outputs for the backward pass.

    Everything else is recomputed from these. Outputs, gradients, statistics and state dict stay the same. Forward hooks
    within a block are called twice. Do not combine this with `recompute`, which keeps still less: the convolutions'
    outputs would be kept nevertheless.
    """
    for block in _outermost_blocks(model):
        block.forward = partial(_run_block, block, block.forward)


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """Compute module(x), keeping only x for the backward pass, which recomputes everything else."""
    if torch.compiler.is_compiling():  # compilers cannot trace our context, and update statistics only once anyway
        return checkpoint(module, x, use_reentrant=False)
    return _checkpointed(module, module, noop_context_fn, x)


def _run_block(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # compilers decide for themselves what is cheap to recompute
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
    """Checkpoint ``forward``, that of ``module``; ``contexts`` gives the contexts of the first and the second pass."""

    def with_frozen_statistics() -> tuple[Any, Any]:
        first, repetition = contexts()
        return first, _frozen_statistics(module, repetition)

    return checkpoint(forward, x, use_reentrant=False, context_fn=with_frozen_statistics, **_OPTIONS)


@contextmanager
def _frozen_statistics(module: nn.Module, repetition: Any) -> Iterator[None]:
    """Enter ``repetition``, the context of the recomputation, with the running statistics in ``module`` frozen.

    The BatchNorms have already counted this batch in the first pass.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with repetition:
            yield
    finally:  # checkpoint() ends the recomputation by an exception as soon as it has what it needs
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches
