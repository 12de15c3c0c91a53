"""Multi-scale Taylor attention, the module that QT-ViT puts in place of EfficientViT's ReLU linear attention.

Shapes: B batch, C channels, H x W the feature map, N = H·W tokens, D channels per head, S = 2 scales, heads = C // D
per scale.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.ops import get_kernel, linear_attention_cf

from .conv import ConvNormAct
from .lean import norm_act


class MultiScaleAttention(nn.Module):
    """Linear attention over tokens at two scales, with a positional map on the keys and a non-linear shortcut on the
    values.

    Args:
        chans: C, in and out; a multiple of ``head_dim``.
        head_dim: D.
        map_size: (H, W) of the learned positional map; it is resized to whatever size the input has.
        kernel: a name in ``qtvit.ops.KERNELS``.
        norm_eps: eps of the BatchNorms.
    """

    num_scales = 2

    def __init__(
        self, chans: int, *, head_dim: int, map_size: tuple[int, int], kernel: str = "taylor2", norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        if chans % head_dim:
            raise ValueError(f"width {chans} of an attention stage is not a multiple of head_dim {head_dim}")
        heads = chans // head_dim
        self.head_dim = head_dim
        self.kernel = kernel
        self.scalars = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(value)) for name, value in get_kernel(kernel).scalars.items()}
        )
        self.qkv = nn.Conv2d(chans, 3 * chans, 1, bias=False)
        self.aggregate = nn.Sequential(
            nn.Conv2d(3 * chans, 3 * chans, 5, padding=2, groups=3 * chans, bias=False),
            nn.Conv2d(3 * chans, 3 * chans, 1, groups=3 * heads, bias=False),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_scales * chans, *map_size))
        self.shortcut_norm = nn.BatchNorm1d(head_dim, eps=norm_eps)
        self.shortcut_act = nn.GELU()
        self.proj = ConvNormAct(self.num_scales * chans, chans, 1, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.multi_scale_qkv(x)
        k = k + self.position(x.shape[-2:]).to(k.dtype)
        out = linear_attention_cf(q, k, v, self.kernel, dict(self.scalars.items()))
        out = out + self.shortcut(v)
        return self.proj(out.flatten(1, 2).unflatten(-1, x.shape[-2:]))

    def multi_scale_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> q, k, v, each (B, S·heads, D, N); keys are still without position.

        They are views of one tensor, which lies as it is indexed whatever the memory format of x: so none is copied.
        """
        qkv = self.qkv(x)
        multi_scale = torch.cat([qkv.flatten(2), self.aggregate(qkv).flatten(2)], 1)
        q, k, v = multi_scale.unflatten(1, (-1, 3, self.head_dim)).unbind(2)
        return q, k, v

    def position(self, size: torch.Size) -> Tensor:
        """The positional map at ``size`` (H, W), as keys: (1, S·heads, D, N). Exactly the parameter at its own size."""
        resized = F.interpolate(self.pos_embed, size=size, mode="bicubic", align_corners=False)
        return resized.flatten(2).unflatten(1, (-1, self.head_dim))

    def shortcut(self, v: Tensor) -> Tensor:
        """GELU(BN(v)); the statistics over D are shared by all heads. (B, S·heads, D, N), same out."""
        return norm_act(v.flatten(0, 1), self.shortcut_norm, self.shortcut_act).unflatten(0, v.shape[:2])
