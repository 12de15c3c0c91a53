"""The paper's Table 3: the Kronecker square and its reductions, as kernels that exist for an ablation alone.

All have the released, normalised form ``w = <g(q)/‖g(q)‖, g(k)/‖g(k)‖> + c²`` with ``taylor2``'s learnable c; they
differ in g, the quadratic terms of x. ``taylor2`` itself keeps the self terms x_i².

Weights: <x ⊗ x, y ⊗ y> = <x, y>² is never negative, so with full, pooled and chunked squares all weights are at least
c². Random terms x_i·x_j have both signs, and their cosine goes down to -1: the constant is 1 + c² there, so that those
weights are not below c² either, and their sum does not vanish. (The paper does not say what it does about that.)

Shapes: as in `qtvit.ops.kernels`, x (B, heads, D, N) -> (B, heads, F, N).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from qtvit.ops import KERNELS, Kernel
from qtvit.ops.kernels import Features, unit

DRAW_SEED = 0
"""Of the random terms, which are the same in all layers and runs."""


def kronecker(x: Tensor) -> Tensor:
    """vec(x ⊗ x), all D² products, those that come twice twice: F = D²."""
    return (x.unsqueeze(-2) * x.unsqueeze(-3)).flatten(-3, -2)


def pooled(x: Tensor, size: int) -> Tensor:
    """The Kronecker square of x averaged over ``size`` neighbouring channels: F = (D/size)²."""
    return kronecker(unit(x.unflatten(-2, (-1, size)).mean(-2)))


def chunked(x: Tensor, num_chunks: int) -> Tensor:
    """The Kronecker squares of ``num_chunks`` parts of x, one after the other: F = D²/num_chunks."""
    return torch.cat([kronecker(part) for part in x.unflatten(-2, (num_chunks, -1)).unbind(-3)], -2)


def random_terms(x: Tensor) -> Tensor:
    """D of the D² products, drawn once: F = D."""
    rows, cols = drawn_terms(x.shape[-2])
    return x[..., rows, :] * x[..., cols, :]


@torch.compiler.assume_constant_result
def drawn_terms(dim: int) -> tuple[list[int], list[int]]:
    """Rows and columns of the products that `random_terms` keeps of ``dim`` channels."""
    drawn = sorted(random.Random(DRAW_SEED).sample(range(dim * dim), dim))
    return [index // dim for index in drawn], [index % dim for index in drawn]


def _normalized(terms: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, c: Tensor, *, const: float = 0.0) -> Features:
    """``terms`` of q and k, made independent of their lengths, with the constant ``const + c²``."""
    return unit(terms(unit(q))), unit(terms(unit(k))), const + c.square()


TABLE3_KERNELS: dict[str, Kernel] = {
    f"table3_{name}": Kernel(partial(_normalized, terms, const=const), {"c": 1.0})
    for name, terms, const in (
        ("full", kronecker, 0.0),
        ("pool2", partial(pooled, size=2), 0.0),
        ("pool4", partial(pooled, size=4), 0.0),
        ("chunk2", partial(chunked, num_chunks=2), 0.0),
        ("chunk4", partial(chunked, num_chunks=4), 0.0),
        ("chunk8", partial(chunked, num_chunks=8), 0.0),
        ("random", random_terms, 1.0),
    )
}
"""Heads need as many channels as a multiple of the pool size or number of chunks."""


@contextmanager
def table3_kernels() -> Iterator[None]:
    """Within this context, models know these kernels by name: to train them, or to load what was trained."""
    added = [name for name in TABLE3_KERNELS if name not in KERNELS]
    KERNELS.update({name: TABLE3_KERNELS[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del KERNELS[name]
