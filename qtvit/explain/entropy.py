"""Measures of how focused attention is."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtvit.layers import MultiScaleAttention
from qtvit.ops import attention_weights

MAX_WEIGHTS = 2**22
"""Number of weights in memory at once while all rows of a layer are measured."""


@dataclass(frozen=True)
class Focus:
    """How focused one attention layer is, as means over all its queries and heads.

    Attributes:
        layer: module name of the layer.
        kernel: name of its kernel.
        map_size: (H, W) of its tokens.
        entropy: entropy of the weights divided by log N: 1 if all weights are equal, 0 if only one is not 0.
        support: effective support exp(entropy) / N, with the entropy in nats: the fraction of tokens attended to.
    """

    layer: str
    kernel: str
    map_size: tuple[int, int]
    entropy: float
    support: float


def sharpness(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy divided by log N, and effective support exp(entropy) / N, of rows of weights: (..., N) -> (...), (...).

    The entropy is that of |w| / Σ|w|, so that it is defined for rows of both signs. Both results are 1 for a single
    token, and NaN for a row of zeros, which the relu kernel may give.
    """
    num_tokens = weights.shape[-1]
    shares = weights.abs()
    shares = shares / shares.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1)
    support = entropy.exp() / num_tokens
    return (entropy / math.log(num_tokens) if num_tokens > 1 else entropy + 1), support


@torch.no_grad()
def layer_focus(layer: MultiScaleAttention, x: Tensor) -> tuple[float, float]:
    """Means of `sharpness` over all queries and heads of ``layer`` for the input x (1, C, H, W).

    Queries whose weights are all 0 are left out; NaN if there are no others. At most `MAX_WEIGHTS` weights, or those of
    one query, are in memory at once.
    """
    q, k, _ = (tokens.mT for tokens in layer.tokens(x))  # (1, heads, N, D)
    _, num_heads, num_tokens, _ = q.shape
    entropies, supports = [], []
    for queries in q.split(max(MAX_WEIGHTS // (num_heads * num_tokens), 1), dim=2):
        weights = attention_weights(queries, k, layer.kernel, dict(layer.scalars.items()), layer.attn_eps)
        entropy, support = sharpness(weights)
        entropies.append(entropy.flatten())
        supports.append(support.flatten())
    return float(torch.cat(entropies).nanmean()), float(torch.cat(supports).nanmean())
