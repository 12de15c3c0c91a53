"""The network with its attention written as in the authors' release, to measure the gain of writing it differently.

Rewritten from what the release does: tokens are transposed to (B, heads, N, D), normalised, squared and normalised
again; the constant c is appended to queries and keys and a column of ones to the values, so that the matrix products
also give the sums and the denominator; and the result is transposed back.

Shapes: B batch, C channels, H x W feature map, N = H·W tokens, D channels per head.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.layers import MultiScaleAttention

EPS = 1e-15


class ReleasedAttention(nn.Module):
    """(B, C, H, W) -> (B, C, H, W); has the weights of ``layer`` and gives the same output up to rounding.

    Raises:
        ValueError: the layer has another kernel than taylor2, no positional map or no shortcut.
    """

    def __init__(self, layer: MultiScaleAttention) -> None:
        super().__init__()
        if layer.kernel != "taylor2" or layer.pos_embed is None or layer.shortcut_norm is None:
            raise ValueError("the release has kernel taylor2, positional maps and the shortcut only")
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        layer, dim, size = self.layer, self.layer.head_dim, x.shape[-2:]
        assert layer.pos_embed is not None
        assert layer.shortcut_norm is not None
        qkv = layer.qkv(x)
        multi_scale = torch.cat([qkv, layer.aggregate(qkv)], 1)
        tokens = multi_scale.reshape(len(x), -1, 3 * dim, size[0] * size[1]).transpose(-1, -2)
        q, k, v = tokens[..., :dim], tokens[..., dim : 2 * dim], tokens[..., 2 * dim :]
        position = F.interpolate(layer.pos_embed, size=size, mode="bicubic", align_corners=False)
        k = k + position.reshape(1, -1, dim, size[0] * size[1]).transpose(-1, -2)
        constant = layer.scalars["c"].expand(*q.shape[:-1], 1)
        f_q, f_k = (torch.cat([self.unit_square(each), constant], -1) for each in (q, k))
        out = f_q @ (f_k.transpose(-1, -2) @ F.pad(v, (0, 1), value=1))
        out = out[..., :-1] / (out[..., -1:] + EPS)
        out = out.transpose(-1, -2).reshape(len(x), -1, *size)
        values = v.transpose(-1, -2).reshape(-1, dim, size[0] * size[1])
        shortcut = layer.shortcut_act(layer.shortcut_norm(values)).reshape(len(x), -1, *size)
        return layer.proj(out + shortcut)

    @staticmethod
    def unit_square(x: Tensor) -> Tensor:
        """The squares of x, normalised over the last dimension before and after squaring."""
        square = (x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)).square()
        return square / square.norm(dim=-1, keepdim=True).clamp_min(EPS)


def as_released(model: nn.Module) -> nn.Module:
    """A copy of a model of ours with `ReleasedAttention` in all its layers; raises the same errors."""
    model = copy.deepcopy(model).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MultiScaleAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention of ours")
    for name, layer in layers.items():
        model.set_submodule(name, ReleasedAttention(layer))
    return model
