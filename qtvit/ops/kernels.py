"""The similarity kernels: softmax, what stands in for it in linear attention, and what others have put in its place.

A linear kernel writes the weight of a pair of tokens as ``w_ij = <f_q(q_i), f_k(k_j)> + const``: a pair of feature
maps, plus the product of the constant features that some append to them (the ``c`` of ``[u(x), c]``, the
``1/sqrt(2)`` of eq. 11). Keeping that product as one number instead of a row of features saves a copy of q and k;
the weights are the same.

Weights that cannot be negative are divided by their sum (eq. 3), whatever their source does. A sum of weights of both
signs can vanish, so those of ``cosine``, ``mean`` and ``taylor1`` are divided by the number of keys instead: outputs do
not grow with the image, and what they may grow with otherwise meets a BatchNorm (or LayerNorm) behind the attention.

Shapes: B batch, D channels per head, N query tokens, M key tokens, F features per head; all channels-first, (B, heads,
D, N) -> (B, heads, F, N).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = 1e-12
"""Floor of the norms and of the sums of weights. All of them are computed in fp32, so it is far above underflow."""

SQUARE_EPS = 1e-18
"""Floor of ‖x²‖₂: about the square of the smallest x whose fourth power fp32 can hold."""
LARGEST = 1e9
"""About the largest x whose fourth power fp32 can hold."""

Features = tuple[Tensor, Tensor, Tensor | float]


@dataclass(frozen=True)
class Kernel:
    """One row of the registry.

    Attributes:
        features: ``(q, k, **scalars) -> (f_q, f_k, const)`` with q (B, heads, D, N), k (B, heads, D, M) in fp32 (or
            fp64). f_q of a query depends on that query alone. None: softmax, which has no finite features.
        scalars: names and initial values of the learnable scalars that ``features`` takes.
        normalized: whether the weights of a query are divided by their sum.
        eps: what is added to that sum.
    """

    features: Callable[..., Features] | None
    scalars: Mapping[str, float] = field(default_factory=dict)
    normalized: bool = True
    eps: float = EPS


def unit_square(x: Tensor) -> Tensor:
    """u(x) = x² / ‖x²‖₂ over D (dim -2), the normalised self terms of the released code.

    Exact where x⁴ stays within fp32, which is from 1e-9 to 1e9. A token of smaller entries has smaller u, down to
    u(0) = 0; larger entries count as 1e9 (exported graphs save that step).
    """
    return unit_square_and_norm(x)[0]


def unit_square_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """u(x), and ‖x²‖₂ or `SQUARE_EPS` if that is larger."""
    if torch.compiler.is_exporting():  # fewer operations, which runtimes do fast
        square = x.square()
        norm = torch.linalg.vector_norm(square, dim=-2, keepdim=True).clamp_min(SQUARE_EPS)
    else:
        square = x.clamp(-LARGEST, LARGEST).square()
        norm = square.square().sum(-2, keepdim=True).clamp_min(SQUARE_EPS**2).sqrt()
    return square / norm, norm


def taylor2(q: Tensor, k: Tensor, c: Tensor) -> Features:
    """The compact quadratic Taylor kernel as released: φ(x) = [u(x), c], so w = <u(q), u(k)> + c²."""
    return unit_square(q), unit_square(k), c.square()


def taylor2_paper(q: Tensor, k: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Features:
    """The compact quadratic Taylor kernel of eq. 11: φ(x) = [α·x², β·(4/d)^¼·x, γ, 1] / √2.

    So w = ½·(α²·<q², k²> + β²·(2/√d)·<q, k> + γ² + 1), never negative for β = 0, which is what the paper's
    experiments use (``beta=None`` leaves those features out), and otherwise while β⁴ <= α²·(γ² + 1). Beyond, nothing
    here keeps a sum of weights from vanishing.
    """
    f_q, f_k = alpha.square() / 2 * q.square(), k.square()
    if beta is not None:
        f_q = torch.cat([f_q, beta.square() / q.shape[-2] ** 0.5 * q], -2)
        f_k = torch.cat([f_k, k], -2)
    return f_q, f_k, (gamma.square() + 1) / 2


def taylor2_full(q: Tensor, k: Tensor) -> Features:
    """All features of the second-order expansion, eq. 8, each product once: w = 1 + s + s²/2, s = <q, k>/√d.

    D(D + 1)/2 quadratic features and D linear ones. Never below ½.
    """
    dim = q.shape[-2]
    rows, cols = torch.triu_indices(dim, dim, device=q.device)
    twice = torch.where(rows == cols, 1.0, 2.0).to(q.dtype).unsqueeze(-1)
    f_q = torch.cat([q[..., rows, :] * q[..., cols, :] * (twice / (2 * dim)), q / dim**0.5], -2)
    f_k = torch.cat([k[..., rows, :] * k[..., cols, :], k], -2)
    return f_q, f_k, 1.0


def taylor1(q: Tensor, k: Tensor) -> Features:
    """The first-order expansion of ViTALiTy (Dass et al., HPCA 2023): w = (1 + <q, k - mean(k)>/√d) / M.

    Softmax does not change when all keys move by the same vector. ViTALiTy centres them, so that the weights of a query
    sum to M whatever the query, and so does this: the division is by M itself, and can not fail. Single weights do turn
    negative, for tokens that are not short. (With φ(x) = [x/d^¼, 1] of keys as they are, the sum could vanish.)
    """
    return q / (q.shape[-2] ** 0.5 * k.shape[-1]), k - k.mean(-1, keepdim=True), 1 / k.shape[-1]


def relu(q: Tensor, k: Tensor) -> Features:
    """EfficientViT's kernel (Cai et al., ICCV 2023): w = <relu(q), relu(k)>. Without any weight, the output is 0.

    Weights shrink with the tokens' squares, so the eps of their sum is EfficientViT's own 1e-15 (timm's port has 1e-5):
    where tokens are so short that it counts, the weights of a query sum to less than 1.
    """
    return q.relu(), k.relu(), 0.0


def elu(q: Tensor, k: Tensor) -> Features:
    """w = <elu(q) + 1, elu(k) + 1>, Katharopoulos et al., "Transformers are RNNs", ICML 2020."""
    return _elu_plus_1(q), _elu_plus_1(k), 0.0


def _elu_plus_1(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # without the cancellation of exp(x) - 1 + 1


def cosine(q: Tensor, k: Tensor) -> Features:
    """The cosine of the angle between tokens, w = <q/‖q‖, k/‖k‖> / M: Hydra attention (Bolya et al., ECCVW 2022).

    Weights have both signs. Hydra sums them without a division (and has as many heads as channels); here they are
    divided by the number of keys, so that outputs are never larger than the largest value.
    """
    return unit(q) / k.shape[-1], unit(k), 0.0


def mean(q: Tensor, k: Tensor) -> Features:
    """Plain products averaged over the keys, φ(x) = x/√M, w = <q, k> / M: PolyNL (Babiloni et al., ICCV 2021).

    Weights have both signs and no bound. As in PolyNL there is no other division: outputs grow with the tokens'
    squares, and only the norm behind the attention keeps them in range. fp16 results saturate.
    """
    return q / k.shape[-1], k, 0.0


def aft(q: Tensor, k: Tensor) -> Features:
    """Sigmoid of the query, softmax of the keys over the tokens: w = <σ(q_i), softmax_j(k_j)>.

    AFT-Simple (Zhai et al., "An Attention Free Transformer", 2021) multiplies channel by channel, with as many heads as
    channels, and does not divide. As in the table of the QT-ViT paper, its two maps are a kernel of linear attention
    here; the weights are positive, so they are normalised.
    """
    return q.sigmoid(), k.softmax(-1), 0.0


def angular(q: Tensor, k: Tensor) -> Features:
    """The linear part of the angle between tokens, w = ½ + <q/‖q‖, k/‖k‖>/π: Castling-ViT (You et al., CVPR 2023).

    Between 0.18 and 0.82, so normalised here. Castling-ViT's code adds ½·v_i in place of the average's half and divides
    each output by its length.
    """
    return unit(q) / math.pi, unit(k), 0.5


def focused(q: Tensor, k: Tensor) -> Features:
    """w = <f(q), f(k)>, f(x) = ‖r‖/‖r³‖·r³ with r = relu(x): FLatten Transformer (Han et al., ICCV 2023), p = 3.

    The power turns a token towards its largest entry and leaves its length; so eps counts for short tokens, as with
    `relu`. (FLatten adds a depthwise convolution of
    the values, in whose place this network has its shortcut.)
    """
    return _focus(q), _focus(k), 0.0


def _focus(x: Tensor) -> Tensor:
    r = x.relu()
    return torch.linalg.vector_norm(r, dim=-2, keepdim=True) * unit(_divided_by_largest(r) ** 3)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖₂ over D (dim -2), with 0, and a derivative of 0, for tokens without an entry above `EPS`."""
    x = _divided_by_largest(x)
    return x * x.square().sum(-2, keepdim=True).clamp_min(0.5).rsqrt()  # the sum is 0, or at least 1


def _divided_by_largest(x: Tensor) -> Tensor:
    """x by its largest entry over D, which is a constant for the gradient: for what ignores the length of x."""
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
"""Names for the ``kernel`` of models and ops; the first is the default."""
