"""Multi-scale Taylor attention, the module that QT-ViT puts in place of EfficientViT's ReLU linear attention; and
attention with the same kernels for plain vision transformers.

Shapes: B batch, C channels, H x W the feature map, N = H·W tokens, D channels per head, S = 2 scales, heads = C // D
per scale.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.ops import get_kernel, linear_attention, linear_attention_cf, masked_softmax_attention_cf

from .conv import ConvNormAct
from .eager import conv_norm_act, grouped_pointwise, is_eager_inference, norm_as_affine, pointwise
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
        ape: whether there is a positional map ("absolute positional embedding").
        shortcut: whether there is a shortcut.
        attn_eps: what is added to the sum of a query's weights; None: the kernel's own.
        softmax_residual: threshold of `qtvit.ops.masked_softmax_attention_cf`, which is added while training, and only
            then (paper, Table 7); 0.02 in Castling-ViT's code. None: no such thing.
    """

    num_scales = 2
    recompute_activations = True

    def __init__(
        self,
        chans: int,
        *,
        head_dim: int,
        map_size: tuple[int, int],
        kernel: str = "taylor2",
        norm_eps: float = 1e-5,
        ape: bool = True,
        shortcut: bool = True,
        attn_eps: float | None = None,
        softmax_residual: float | None = None,
    ) -> None:
        super().__init__()
        if chans % head_dim:
            raise ValueError(f"width {chans} of an attention stage is not a multiple of head_dim {head_dim}")
        if softmax_residual is not None and not 0 < softmax_residual < 1:
            raise ValueError(f"softmax_residual is a threshold between 0 and 1 such as 0.02, got {softmax_residual}")
        heads = chans // head_dim
        self.head_dim = head_dim
        self.kernel = kernel
        self.attn_eps = attn_eps
        self.softmax_residual = softmax_residual
        self.scalars = _learnable_scalars(kernel)
        self.qkv = nn.Conv2d(chans, 3 * chans, 1, bias=False)
        self.aggregate = nn.Sequential(
            nn.Conv2d(3 * chans, 3 * chans, 5, padding=2, groups=3 * chans, bias=False),
            nn.Conv2d(3 * chans, 3 * chans, 1, groups=3 * heads, bias=False),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_scales * chans, *map_size)) if ape else None
        self.shortcut_norm: nn.Module | None = nn.BatchNorm1d(head_dim, eps=norm_eps) if shortcut else None
        self.shortcut_act = nn.GELU()
        self.proj = ConvNormAct(self.num_scales * chans, chans, 1, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.tokens(x)
        out = linear_attention_cf(q, k, v, self.kernel, dict(self.scalars.items()), self.attn_eps)
        if self.softmax_residual is not None and self.training:
            out = out + masked_softmax_attention_cf(q, k, v, self.softmax_residual)
        if self.shortcut_norm is not None:
            out = out + self.shortcut(v)
        out = out.flatten(1, 2).unflatten(-1, x.shape[-2:])
        if is_eager_inference(x, self.proj, *self.proj):
            return conv_norm_act(out, *self.proj, channels_last=x.is_contiguous(memory_format=torch.channels_last))
        return self.proj(out)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the q, k, v that attention sees, each (B, S·heads, D, N); N counts row by row."""
        q, k, v = self.multi_scale_qkv(x)
        if self.pos_embed is not None:
            k = k + self.position(x.shape[-2:]).to(k.dtype)
        return q, k, v

    def multi_scale_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> q, k, v, each (B, S·heads, D, N); keys are still without position.

        They are views of one tensor, which lies as it is indexed whatever the memory format of x: so none is copied.
        """
        depth_conv, point_conv = cast(list[nn.Conv2d], list(self.aggregate))
        if is_eager_inference(x, self.qkv, self.aggregate, depth_conv, point_conv):
            qkv = pointwise(x, self.qkv.weight, None, channels_last=False)
            aggregated = grouped_pointwise(depth_conv(qkv), point_conv.weight, point_conv.groups)
        else:
            qkv = self.qkv(x)
            aggregated = self.aggregate(qkv)
        multi_scale = torch.cat([qkv.flatten(2), aggregated.flatten(2)], 1)
        q, k, v = multi_scale.unflatten(1, (-1, 3, self.head_dim)).unbind(2)
        return q, k, v

    def position(self, size: torch.Size) -> Tensor:
        """The positional map at ``size`` (H, W), as keys: (1, S·heads, D, N). Exactly the parameter at its own size."""
        assert self.pos_embed is not None
        resized: Tensor = self.pos_embed
        if any(isinstance(side, torch.SymInt) for side in size) or size != resized.shape[-2:]:
            resized = F.interpolate(resized, size=size, mode="bicubic", align_corners=False)
        # a network in channels-last has made the parameter so, too, but keys are channels-first
        return resized.contiguous().flatten(2).unflatten(1, (-1, self.head_dim))

    def shortcut(self, v: Tensor) -> Tensor:
        """GELU(BN(v)); the statistics over D are shared by all heads. (B, S·heads, D, N), same out."""
        assert self.shortcut_norm is not None
        if is_eager_inference(v, self, self.shortcut_norm, self.shortcut_act):
            return self.shortcut_act(norm_as_affine(v.flatten(0, 1), self.shortcut_norm)).unflatten(0, v.shape[:2])
        tokens, shape = v.flatten(0, 1), v.shape[:2]
        if not self.recompute_activations:
            return self.shortcut_act(self.shortcut_norm(tokens)).unflatten(0, shape)
        return norm_act(tokens, self.shortcut_norm, self.shortcut_act).unflatten(0, shape)


class LinearAttention(nn.Module):
    """Self-attention with a linear kernel, for timm's transformers: (B, N, C) -> (B, N, C).

    As in ``timm.create_model("deit_small_patch16_224", img_size=1024, attn_layer=LinearAttention)``. timm wants a class
    there; for another kernel, make a subclass with ``kernel = "relu"`` in it. Parameters have the names of
    ``timm.layers.Attention``, besides the kernel's scalars, so its weights load.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: heads of D = C // num_heads channels.
        qkv_bias, proj_bias: whether the linear layers have biases.
        qk_norm: whether ``norm_layer(D)`` is applied to queries and keys.
        scale_norm: whether ``norm_layer(C)`` is applied before the projection.
        attn_drop: 0; there are no weights that could be dropped.
        proj_drop: dropout behind the projection.
        norm_layer: for ``qk_norm`` and ``scale_norm``.
        kernel: a name in ``qtvit.ops.KERNELS``; default: the class's.
        device, dtype: as for any ``torch.nn`` module.

    Raises:
        ValueError: an unknown kernel, a dim that heads cannot share, ``attn_drop``, or ``qk_norm`` without a norm; in
            ``forward`` a mask.
    """

    kernel = "taylor2"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        kernel: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if attn_drop:
            raise ValueError(f"linear attention has no weights to drop: attn_drop has to be 0, got {attn_drop}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.kernel = self.kernel if kernel is None else kernel
        self.scalars = _learnable_scalars(self.kernel).to(**where)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **where)
        self.q_norm = norm_layer(head_dim, **where) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(head_dim, **where) if qk_norm and norm_layer else nn.Identity()
        self.norm = norm_layer(dim, **where) if scale_norm and norm_layer else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("LinearAttention sums over all tokens once, for all queries: it takes no mask")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = linear_attention(self.q_norm(q), self.k_norm(k), v, self.kernel, dict(self.scalars.items()))
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


def _learnable_scalars(kernel: str) -> nn.ParameterDict:
    scalars = get_kernel(kernel).scalars
    return nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in scalars.items()})
