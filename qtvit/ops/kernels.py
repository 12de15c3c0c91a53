"""The similarity kernels: what stands in for ``exp(<q, k>)`` in linear attention.

A kernel writes the weight of a pair of tokens as ``w_ij = <f_q(q_i), f_k(k_j)> + const``: a pair of feature maps,
plus the product of the constant features that the paper appends to them (the ``c`` of ``[u(x), c]``, the
``1/sqrt(2)`` of eq. 11). Keeping that product as one number instead of a row of features saves a copy of q and k;
the weights are the same.

Shapes: B batch, D channels per head, N tokens, F features per head; all channels-first, (B, heads, D, N) -> (B,
heads, F, N).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12
"""Floor of the norms and of the sums of weights. All of them are computed in fp32, so it is far above underflow."""

Features = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    """One row of the registry.

    Attributes:
        features: ``(q, k, **scalars) -> (f_q, f_k, const)`` with q, k of shape (B, heads, D, N) in fp32 (or fp64).
        scalars: names and initial values of the learnable scalars that ``features`` takes.
        optional_scalars: names of further scalars that ``features`` can do without.
        normalized: whether the weights of a query are divided by their sum.
    """

    features: Callable[..., Features]
    scalars: Mapping[str, float] = field(default_factory=dict)
    optional_scalars: tuple[str, ...] = ()
    normalized: bool = True


def unit_square(x: Tensor) -> Tensor:
    """u(x) = x² / ‖x²‖₂ over D (dim -2), the normalised self terms of the released code.

    u does not depend on the length of x, so x is divided by its largest entry first (a constant as far as the
    gradient is concerned). The squares then neither overflow nor underflow, and u(0) = 0.
    """
    if torch.compiler.is_compiling():
        return _unit_square(x)[0]
    return _UnitSquare.apply(x)[0]


def _unit_square(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u(x), the largest entry of x and 1 / ‖(x / largest)²‖₂; the latter is constant where it would overflow."""
    largest = x.detach().abs().amax(-2, keepdim=True).clamp_min(EPS)
    square = (x / largest).square()
    inv_norm = square.square().sum(-2, keepdim=True).clamp_min(EPS).rsqrt()
    return square * inv_norm, largest, inv_norm


class _UnitSquare(torch.autograd.Function):
    """u with its derivative written out, which needs no more than x and u: ∂u_i/∂x_j = 2·x_j/‖x²‖·(δ_ij - u_i·u_j)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _unit_square(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> Tensor:
        x, u, largest, inv_norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the derivative is asked for
            return torch.autograd.grad(_unit_square(x)[0], x, grad, create_graph=True)[0]
        along_u = (grad * u).sum(-2, keepdim=True) * (inv_norm < EPS**-0.5)
        return torch.addcmul(grad, u, along_u, value=-1) * (x / largest) * (2 * inv_norm / largest)


def taylor2(q: Tensor, k: Tensor, c: Tensor) -> Features:
    """The compact quadratic Taylor kernel as released: φ(x) = [u(x), c], so w = <u(q), u(k)> + c²."""
    return unit_square(q), unit_square(k), c.square()


def taylor2_paper(q: Tensor, k: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Features:
    """The compact quadratic Taylor kernel of eq. 11: φ(x) = [α·x², β·(4/d)^¼·x, γ, 1] / √2.

    So w = ½·(α²·<q², k²> + β²·(2/√d)·<q, k> + γ² + 1), never negative for β = 0, which is what the paper's
    experiments use (``beta=None`` leaves those features out).
    """
    f_q, f_k = alpha.square() / 2 * q.square(), k.square()
    if beta is not None:
        f_q = torch.cat([f_q, beta.square() / q.shape[-2] ** 0.5 * q], -2)
        f_k = torch.cat([f_k, k], -2)
    return f_q, f_k, (gamma.square() + 1) / 2


KERNELS: dict[str, Kernel] = {
    "taylor2": Kernel(taylor2, {"c": 1.0}),
    "taylor2_paper": Kernel(taylor2_paper, {"alpha": 1.0, "gamma": 1.0}, optional_scalars=("beta",)),
}
