"""How focused attention is, as numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtvit.layers import MultiScaleAttention
from qtvit.ops import attention_weights

MAX_WEIGHTS = 2**22
"""Weights that are in memory at once while all rows of a layer are measured."""


@dataclass(frozen=True)
class Focus:
    """How focused one attention layer is: means over all its queries and heads.

    Attributes:
        layer: module name.
        kernel: its name.
        map_size: (H, W) of its tokens.
        entropy: of the weights in nats, divided by log N: 1 for weights that are all equal, 0 for a single one.
        support: effective support, exp(entropy) / N: the share of the tokens that a query attends to.
    """

    layer: str
    kernel: str
    map_size: tuple[int, int]
    entropy: float
    support: float


def sharpness(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats divided by log N, and effective support exp(entropy) / N, of rows of weights.

    Weights are taken as shares |w| / Σ|w|, so rows of both signs have them too. Both are 1 for a single token, and NaN
    for a row without any weight, as relu's may be.

    (..., N) -> (...), (...).
    """
    num_tokens = weights.shape[-1]
    shares = weights.abs()
    shares = shares / shares.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1)
    support = entropy.exp() / num_tokens
    return (entropy / math.log(num_tokens) if num_tokens > 1 else entropy + 1), support


@torch.no_grad()
def layer_focus(layer: MultiScaleAttention, x: Tensor) -> tuple[float, float]:
    """Means of `sharpness` over all queries and heads of ``layer`` with the input x (1, C, H, W).

    Queries without any weight are left out; NaN if there is no other. At most `MAX_WEIGHTS` weights (or one query's)
    are in memory at once.
    """
    q, k, _ = (tokens.mT for tokens in layer.tokens(x))  # (1, heads, N, D)
    _, num_heads, num_tokens, _ = q.shape
    entropies, supports = [], []
    for queries in q.split(max(MAX_WEIGHTS // (num_heads * num_tokens), 1), dim=2):
        entropy, support = sharpness(
            attention_weights(queries, k, layer.kernel, dict(layer.scalars.items()), layer.attn_eps)
        )
        entropies.append(entropy.flatten())
        supports.append(support.flatten())
    return float(torch.cat(entropies).nanmean()), float(torch.cat(supports).nanmean())
