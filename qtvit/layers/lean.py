"""Training with less memory: what is cheap to compute is computed again in the backward pass instead of being kept.

Autograd keeps the input of every operation that needs it. In ``conv -> norm -> act -> conv`` that is the map between
each two of them; but norm and activation are cheap, so the output of the first convolution is enough. A compiler
decides about this by itself, so compiled graphs get the plain operations.

Shapes: B batch, C channels, H x W the feature map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qtvit.ops.attention import is_eager_training


def is_lean(x: Tensor, *norms: nn.Module) -> bool:
    """Whether there is anything to gain for ``x`` here: eager training of plain tensors (no fx proxies), through
    BatchNorms that use the statistics of their own batch (none that are frozen or synchronised).
    """
    return is_eager_training(x) and all(
        type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.training for norm in norms
    )


def set_recompute_activations(model: nn.Module, enable: bool) -> None:
    """Whether the layers of ``model`` forget what they can compute again (as they do) or keep it, which is faster."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "recompute_activations"):
            layer.recompute_activations = enable


def norm_act(x: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
    """act(norm(x)), where it `is_lean` without keeping norm(x) for the backward pass."""
    if not is_lean(x, norm):
        return act(norm(x))
    normed, renorm = _norm(x, norm)
    with _forget(normed, renorm):
        return act(normed)


def norm_act_conv(x: Tensor, norm: nn.Module | None, act: nn.Module, conv: nn.Module) -> Tensor:
    """conv(act(norm(x))), keeping x alone for the backward pass; there may be no norm."""
    if norm is None:
        kept = _keep(x)
        activated = act(x)
        with _forget(activated, lambda: act(kept())):
            return conv(activated)
    normed, renorm = _norm(x, norm)
    again: list[Tensor] = []  # the convolution comes first in the backward pass, and leaves norm(x) to the activation

    def reactivate() -> Tensor:
        again.append(renorm())
        return act(again[0])

    with _forget(normed, lambda: again.pop() if again else renorm()):
        activated = act(normed)
    with _forget(activated, reactivate):
        return conv(activated)


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), keeping x alone: all else is computed again in the backward pass.

    BatchNorms, which then run twice, count the batch once.
    """

    if torch.compiler.is_compiling():  # a compiled graph updates statistics once, however often it computes them
        return checkpoint(module, x, use_reentrant=False)
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(module)))


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """The BatchNorms in ``module`` leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:  # checkpointing leaves by an exception once it has what it needs
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Callable[[], Tensor]]:
    """norm(x) with the statistics of the batch, and what computes it again from these statistics."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
    weight, bias = norm.weight, norm.bias
    out, mean, inv_std = torch.native_batch_norm(
        x, weight, bias, norm.running_mean, norm.running_var, True, momentum or 0.0, norm.eps
    )
    kept = _keep(x)

    def again() -> Tensor:  # not F.batch_norm, which in some releases of PyTorch refuses an eps of 0
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(kept(), weight, bias, mean, inv_std.pow(-2), False, 0.0, 0.0, cudnn)

    return out, again


class _Keep(torch.autograd.Function):
    """A node of the graph that does nothing but keep its input, as autograd keeps tensors (so that an enclosing
    checkpoint may forget and recompute it).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise AssertionError("nothing depends on the output")


def _keep(x: Tensor) -> Callable[[], Tensor]:
    """A way to get ``x`` back in the backward pass."""
    keeper: Any = _Keep.apply(x)
    if keeper.grad_fn is None:  # nothing before x is trained
        constant = x.detach()
        return lambda: constant
    return lambda: keeper.grad_fn.saved_tensors[0]


def _forget(tensor: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    """A context in which autograd does not keep ``tensor`` but calls ``again`` when it needs it."""
    pointer, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == pointer and saved.shape == shape else saved

    @torch.no_grad()
    def unpack(saved: Tensor | None) -> Tensor:
        return again() if saved is None else saved

    return saved_tensors_hooks(pack, unpack)
