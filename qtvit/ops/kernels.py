"""The similarity kernels: softmax, the quadratic Taylor kernels that approximate it, and the kernels of related work.

A linear kernel writes the weight of a pair of tokens as ``w_ij = <f_q(q_i), f_k(k_j)> + const``: a pair of kernel
feature maps, plus the product of the constant features that some kernels append (the ``c`` of ``[u(x), c]``, the
``1/sqrt(2)`` of eq. 11). Keeping that product as one number instead of a row of features saves a copy of q and k;
the weights are the same.

Weights that cannot be negative are divided by their sum (eq. 3), whether or not the kernel's source does so. Weights of
both signs can sum to zero, so those of ``cosine``, ``mean`` and ``taylor1`` are divided by the number of keys instead:
outputs then do not grow with the image, and the norm (Batch- or LayerNorm) after the attention takes care of any other
growth.

Shapes: B batch, D channels per head, N query tokens, M key tokens, F features per head; all channels-first, (B, heads,
D, N) -> (B, heads, F, N).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = 1e-12
"""Added to sums of weights; `unit` maps tokens with no entry this large to 0. Far above underflow, as all is fp32."""

SQUARE_EPS = 1e-18
"""Floor of ‖x²‖₂: about the square of the smallest x whose fourth power fp32 can hold."""
LARGEST = 1e9
"""Entries are clamped to this magnitude: about the largest x whose fourth power fp32 can hold."""

Features = tuple[Tensor, Tensor, Tensor | float]
"""What a kernel computes from q and k: f_q (B, heads, F, N), f_k (B, heads, F, M) and const."""


@dataclass(frozen=True)
class Kernel:
    """A similarity kernel, one row of `KERNELS`.

    Attributes:
        features: ``(q, k, **scalars) -> (f_q, f_k, const)`` with q (B, heads, D, N), k (B, heads, D, M) in fp32 (or
            fp64). The f_q of a query depends on that query alone, so a subset of queries can be passed. None: softmax,
            which has no finite-dimensional features.
        scalars: names and initial values of the learnable scalars that ``features`` takes.
        normalized: whether the weights of a query are divided by their sum.
        eps: added to that sum.
    """

    features: Callable[..., Features] | None
    scalars: Mapping[str, float] = field(default_factory=dict)
    normalized: bool = True
    eps: float = EPS


def unit_square(x: Tensor) -> Tensor:
    """u(x) = x² / ‖x²‖₂ over D (dim -2), the normalised self terms of the released code.

    Exact for entries from 1e-9 to 1e9, whose fourth power fp32 can hold. A token of smaller entries has a shorter u,
    down to u(0) = 0; larger entries are clamped to 1e9 (exported graphs omit the clamp).
    """
    return unit_square_and_norm(x)[0]


def unit_square_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """u(x) and its denominator, ‖x²‖₂ but at least `SQUARE_EPS`."""
    if torch.compiler.is_exporting():  # fewer operations, all of them fast in inference runtimes
        square = x.square()
        norm = torch.linalg.vector_norm(square, dim=-2, keepdim=True).clamp_min(SQUARE_EPS)
    else:
        square = x.clamp(-LARGEST, LARGEST).square()
        # The floor comes before the root, whose derivative at 0 is infinite.
        norm = square.square().sum(-2, keepdim=True).clamp_min(SQUARE_EPS**2).sqrt()
    return square / norm, norm


def taylor2(q: Tensor, k: Tensor, c: Tensor) -> Features:
    """The compact quadratic Taylor kernel as released, the default: φ(x) = [u(x), c], so w = <u(q), u(k)> + c²."""
    return unit_square(q), unit_square(k), c.square()


def taylor2_paper(q: Tensor, k: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Features:
    """The compact quadratic Taylor kernel of eq. 11: φ(x) = [α·x², β·(4/D)^¼·x, γ, 1] / √2.

    So w = ½·(α²·<q², k²> + β²·(2/√D)·<q, k> + γ² + 1). It is never negative for β = 0, the value in all of the paper's
    experiments (``beta=None`` leaves the linear features out), and otherwise while β⁴ <= α²·(γ² + 1). For larger β,
    nothing here prevents a sum of weights from vanishing.
    """
    f_q, f_k = alpha.square() / 2 * q.square(), k.square()
    if beta is not None:
        f_q = torch.cat([f_q, beta.square() / q.shape[-2] ** 0.5 * q], -2)
        f_k = torch.cat([f_k, k], -2)
    return f_q, f_k, (gamma.square() + 1) / 2


def taylor2_full(q: Tensor, k: Tensor) -> Features:
    """The full second-order expansion (eq. 8) with each product once: w = 1 + s + s²/2, s = <q, k>/√D.

    It has D(D + 1)/2 quadratic features and D linear ones. w is never below ½.
    """
    dim = q.shape[-2]
    rows, cols = torch.triu_indices(dim, dim, device=q.device)
    twice = torch.where(rows == cols, 1.0, 2.0).to(q.dtype).unsqueeze(-1)
    f_q = torch.cat([q[..., rows, :] * q[..., cols, :] * (twice / (2 * dim)), q / dim**0.5], -2)
    f_k = torch.cat([k[..., rows, :] * k[..., cols, :], k], -2)
    return f_q, f_k, 1.0


def taylor1(q: Tensor, k: Tensor) -> Features:
    """The first-order expansion of ViTALiTy (Dass et al., HPCA 2023): w = (1 + <q, k - mean(k)>/√D) / M.

    Softmax does not change when the same vector is subtracted from all keys. ViTALiTy subtracts their mean, so that the
    weights before the division sum to M for every query, and the division by M cannot fail. Single weights can be
    negative, for tokens that are not short. (With φ(x) = [x/D^¼, 1] and keys that are not centred, the sum could
    vanish.)
    """
    return q / (q.shape[-2] ** 0.5 * k.shape[-1]), k - k.mean(-1, keepdim=True), 1 / k.shape[-1]


def relu(q: Tensor, k: Tensor) -> Features:
    """EfficientViT's kernel (Cai et al., ICCV 2023): w = <relu(q), relu(k)>. If all weights are 0, so is the output.

    Weights shrink with the square of the tokens' length, so the eps of their sum is EfficientViT's own 1e-15 (timm's
    port has 1e-5). For tokens so short that eps matters, the weights of a query sum to less than 1.
    """
    return q.relu(), k.relu(), 0.0


def elu(q: Tensor, k: Tensor) -> Features:
    """w = <elu(q) + 1, elu(k) + 1>, the kernel of "Transformers are RNNs" (Katharopoulos et al., ICML 2020)."""
    return _elu_plus_1(q), _elu_plus_1(k), 0.0


def _elu_plus_1(x: Tensor) -> Tensor:
    # Not F.elu(x) + 1, whose exp(x) - 1 + 1 cancels digits. The clamp keeps the gradient of exp finite for large x.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def cosine(q: Tensor, k: Tensor) -> Features:
    """The cosine of the angle between tokens, w = <q/‖q‖, k/‖k‖> / M: Hydra attention (Bolya et al., ECCVW 2022).

    Weights have both signs. Hydra sums them without a division (and has as many heads as channels); here they are
    divided by the number of keys, so that no output is larger than the largest value.
    """
    return unit(q) / k.shape[-1], unit(k), 0.0


def mean(q: Tensor, k: Tensor) -> Features:
    """Dot products divided by the number of keys, w = <q, k> / M, φ(x) = x/√M: PolyNL (Babiloni et al., ICCV 2021).

    Weights have both signs and no bound. As in PolyNL, there is no other division: outputs grow with the square of the
    tokens' length, and only the norm after the attention keeps them in range. fp16 outputs saturate.
    """
    return q / k.shape[-1], k, 0.0


def aft(q: Tensor, k: Tensor) -> Features:
    """Sigmoid of the query, softmax of the keys over the tokens: w = <σ(q_i), softmax_j(k_j)>.

    AFT-Simple (Zhai et al., "An Attention Free Transformer", 2021) multiplies channel by channel, as if it had as many
    heads as channels, and does not divide. Here, as in Table 2 of the QT-ViT paper, its two functions make a kernel of
    linear attention; the weights are positive, so they are normalised.
    """
    return q.sigmoid(), k.softmax(-1), 0.0


def angular(q: Tensor, k: Tensor) -> Features:
    """The linear part of the angular kernel, w = ½ + <q/‖q‖, k/‖k‖>/π: Castling-ViT (You et al., CVPR 2023).

    Weights lie between 0.18 and 0.82, so they are normalised here. Castling-ViT's code adds ½·v_i instead of half the
    average of the values, and divides each output by its length.
    """
    return unit(q) / math.pi, unit(k), 0.5


def focused(q: Tensor, k: Tensor) -> Features:
    """w = <f(q), f(k)>, f(x) = ‖r‖/‖r³‖·r³ with r = relu(x): FLatten Transformer (Han et al., ICCV 2023), p = 3.

    The power turns a token towards its largest entry and keeps its length, so eps matters for short tokens, as with
    `relu`. (FLatten adds a depthwise convolution of the values; this network has its shortcut instead.)
    """
    return _focus(q), _focus(k), 0.0


def _focus(x: Tensor) -> Tensor:
    r = x.relu()
    # The division keeps the cube within fp32; unit() cancels it.
    return torch.linalg.vector_norm(r, dim=-2, keepdim=True) * unit(_divided_by_largest(r) ** 3)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖₂ over D (dim -2); tokens with no entry as large as `EPS` give 0 and have a gradient of 0."""
    x = _divided_by_largest(x)
    return x * x.square().sum(-2, keepdim=True).clamp_min(0.5).rsqrt()  # the sum is either 0 or at least 1


def _divided_by_largest(x: Tensor) -> Tensor:
    """x divided by its largest magnitude over D, a constant in the gradient: for use where the length of x cancels."""
    largest = x.detach().abs().amax(-2, keepdim=True)
    return x / largest.masked_fill(largest < EPS, torch.inf)


KERNELS: dict[str, Kernel] = {
    "taylor2": Kernel(taylor2, {"c": 1.0}),
    "taylor2_paper": Kernel(taylor2_paper, {"alpha": 1.0, "gamma": 1.0}),
    "taylor2_paper_beta": Kernel(taylor2_paper, {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}),
    "taylor2_full": Kernel(taylor2_full),
    "taylor1": Kernel(taylor1, normalized=False),
    "relu": Kernel(relu, eps=1e-15),
    "elu": Kernel(elu),
    "cosine": Kernel(cosine, normalized=False),
    "mean": Kernel(mean, normalized=False),
    "aft": Kernel(aft),
    "angular": Kernel(angular),
    "focused": Kernel(focused, eps=1e-15),
    "softmax": Kernel(None),
}
"""Kernels by name, as for the ``kernel`` argument of models and ops; the first is the default."""
