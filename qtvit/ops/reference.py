"""The same attention with its N x M weights written out: the slow, obvious form that the fast one is tested against.

Everything here has the layout (B, heads, N, D) and computes in the dtype of its input; pass float64 for a reference.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import KERNELS


def exp_taylor2(s: Tensor) -> Tensor:
    """Second-order Taylor expansion of exp(s), 1 + s + s²/2 = ½(s + 1)² + ½ (eq. 4); positive for every s."""
    return (s + 1).square() / 2 + 0.5


def kronecker_features(x: Tensor) -> Tensor:
    """φ(x) of eq. 8 with all (D + 1)² products, (..., D) -> (..., (D+1)²+1).

    <φ(q), φ(k)> is exactly exp_taylor2(<q, k>/√D).
    """
    extended = torch.cat([x / x.shape[-1] ** 0.25, torch.ones_like(x[..., :1])], -1)
    products = (extended.unsqueeze(-1) * extended.unsqueeze(-2)).flatten(-2)
    return torch.cat([products, torch.ones_like(x[..., :1])], -1) / 2**0.5


def symmetric_features(x: Tensor) -> Tensor:
    """`kronecker_features` without the duplicates x_i x_j = x_j x_i: off-diagonal products appear once, scaled by √2.

    (..., D) -> (..., (D+1)(D+2)/2 + 1), of which D(D+1)/2 are quadratic in x.
    """
    extended = torch.cat([x / x.shape[-1] ** 0.25, torch.ones_like(x[..., :1])], -1)
    rows, cols = torch.triu_indices(extended.shape[-1], extended.shape[-1], device=x.device)
    scale = torch.where(rows == cols, x.new_tensor(1), x.new_tensor(2).sqrt())
    products = extended[..., rows] * extended[..., cols] * scale
    return torch.cat([products, torch.ones_like(x[..., :1])], -1) / 2**0.5


def taylor2_weights(q: Tensor, k: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """w_ij = <q_i²/‖q_i²‖, k_j²/‖k_j²‖> + c², the form of the released code."""

    def unit(x: Tensor) -> Tensor:
        # As in the release, x is divided by its length first, against overflow and underflow of x⁴; that cancels.
        length = x.norm(dim=-1, keepdim=True)
        square = (x / torch.where(length > 0, length, 1)).square()
        square_length = square.norm(dim=-1, keepdim=True)
        return square / torch.where(square_length > 0, square_length, 1)

    return unit(q) @ unit(k).mT + c**2


def taylor2_paper_weights(
    q: Tensor, k: Tensor, alpha: float | Tensor = 1.0, gamma: float | Tensor = 1.0, beta: float | Tensor = 0.0
) -> Tensor:
    """w_ij = <φ(q_i), φ(k_j)> with φ of eq. 11 written out, including its constant features."""

    def phi(x: Tensor) -> Tensor:
        one = torch.ones_like(x[..., :1])
        compact = torch.cat([alpha * x.square(), beta * (4 / x.shape[-1]) ** 0.25 * x, gamma * one], -1)
        return torch.cat([compact / 2**0.5, one / 2**0.5], -1)

    return phi(q) @ phi(k).mT


def taylor2_full_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = ½(s + 1)² + ½, s = <q_i, k_j>/√D (eq. 4)."""
    return exp_taylor2(q @ k.mT / q.shape[-1] ** 0.5)


def taylor1_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = (1 + <q_i, k_j - mean(k)>/√D) / M."""
    weights = 1 + q @ (k - k.mean(-2, keepdim=True)).mT / q.shape[-1] ** 0.5
    return weights / k.shape[-2]


def relu_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = <relu(q_i), relu(k_j)>."""
    return q.clamp_min(0) @ k.clamp_min(0).mT


def elu_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = <elu(q_i) + 1, elu(k_j) + 1>."""
    return (F.elu(q) + 1) @ (F.elu(k) + 1).mT


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """<q_i, k_j> / (‖q_i‖·‖k_j‖); 0 for zero tokens."""
    lengths = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    return q @ k.mT / torch.where(lengths > 0, lengths, 1)


def aft_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = Σ_c σ(q_ic)·exp(k_jc) / Σ_l exp(k_lc)."""
    shares = (k - k.amax(-2, keepdim=True)).exp()
    return torch.sigmoid(q) @ (shares / shares.sum(-2, keepdim=True)).mT


def focused_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = <f(q_i), f(k_j)>, f(x) = ‖r‖/‖r³‖·r³, r = relu(x)."""

    def focus(x: Tensor) -> Tensor:
        r = x.clamp_min(0)
        length = (r**3).norm(dim=-1, keepdim=True)
        return r.norm(dim=-1, keepdim=True) / torch.where(length > 0, length, 1) * r**3

    return focus(q) @ focus(k).mT


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """w_ij = exp(<q_i, k_j>/√D - largest exponent of row i); the normalisation cancels what is subtracted."""
    s = q @ k.mT / q.shape[-1] ** 0.5
    return (s - s.amax(-1, keepdim=True)).exp()


REFERENCE_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "taylor2": taylor2_weights,
    "taylor2_paper": taylor2_paper_weights,
    "taylor2_paper_beta": partial(taylor2_paper_weights, beta=1.0),
    "taylor2_full": taylor2_full_weights,
    "taylor1": taylor1_weights,
    "relu": relu_weights,
    "elu": elu_weights,
    "cosine": lambda q, k: cosines(q, k) / k.shape[-2],
    "mean": lambda q, k: q @ k.mT / k.shape[-2],
    "aft": aft_weights,
    "angular": lambda q, k: 0.5 + cosines(q, k) / math.pi,
    "focused": focused_weights,
    "softmax": softmax_weights,
}


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: str = "taylor2", eps: float | None = None, **scalars: float | Tensor
) -> Tensor:
    """`qtvit.ops.linear_attention` with the N x M weights formed: the same shapes and the same result.

    O_i = Σ_j w_ij v_j, divided by Σ_j w_ij + eps if the kernel is normalised.
    """
    weights = REFERENCE_WEIGHTS[kernel](q, k, **scalars)
    if KERNELS[kernel].normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + (KERNELS[kernel].eps if eps is None else eps))
    return weights @ v
