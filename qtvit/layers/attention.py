"""QT-ViT's multi-scale attention, which takes the place of EfficientViT's, and linear attention for timm's ViTs.

Shapes: B batch, C channels, H x W feature map, N = H·W tokens, D channels per head, S = 2 scales, heads = C // D per
scale.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.ops import get_kernel, linear_attention, linear_attention_cf, masked_softmax_attention_cf

from .conv import ConvNormAct


class MultiScaleAttention(nn.Module):
    """Linear attention over tokens at two scales (QT-ViT, section 3): (B, C, H, W) -> (B, C, H, W).

    The second scale aggregates q, k and v over 5×5 neighbourhoods. A learned positional map is added to the keys, and
    the non-linear shortcut GELU(BN(v)) to the output of the attention, before the projection.

    Args:
        chans: C, a multiple of ``head_dim``.
        head_dim: D.
        map_size: (H, W) of the learned positional map, which is resized to the input feature map.
        kernel: a name in ``qtvit.ops.KERNELS``.
        norm_eps: eps of the BatchNorms.
        ape: whether to add the positional map ("absolute positional embedding").
        shortcut: whether to add the shortcut.
        attn_eps: added to a query's sum of weights; None: the kernel's own eps.
        softmax_residual: threshold of a `MaskedSoftmaxResidual`; None: no such residual.

    Raises:
        ValueError: ``chans`` is not a multiple of ``head_dim``, the kernel is unknown, or the threshold out of range.
    """

    num_scales = 2

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
        heads = chans // head_dim
        self.head_dim = head_dim
        self.kernel = kernel
        self.attn_eps = attn_eps
        self.scalars = _learnable_scalars(kernel)
        self.qkv = nn.Conv2d(chans, 3 * chans, 1, bias=False)
        self.aggregate = nn.Sequential(
            nn.Conv2d(3 * chans, 3 * chans, 5, padding=2, groups=3 * chans, bias=False),
            nn.Conv2d(3 * chans, 3 * chans, 1, groups=3 * heads, bias=False),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_scales * chans, *map_size)) if ape else None
        self.shortcut_norm: nn.Module | None = nn.BatchNorm1d(head_dim, eps=norm_eps) if shortcut else None
        self.shortcut_act = nn.GELU()
        self.softmax_residual = None if softmax_residual is None else MaskedSoftmaxResidual(softmax_residual)
        self.proj = ConvNormAct(self.num_scales * chans, chans, 1, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.tokens(x)
        out = linear_attention_cf(q, k, v, self.kernel, dict(self.scalars.items()), self.attn_eps)
        if self.softmax_residual is not None:
            out = self.softmax_residual(out, q, k, v)
        if self.shortcut_norm is not None:
            out = out + self.shortcut(v)
        return self.proj(out.flatten(1, 2).unflatten(-1, x.shape[-2:]))

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> the q, k, v of the attention, each (B, S·heads, D, N) with tokens in row-major order."""
        q, k, v = self.multi_scale_qkv(x)
        if self.pos_embed is not None:
            k = k + self.position(x.shape[-2:]).to(k.dtype)
        return q, k, v

    def multi_scale_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> q, k, v, each (B, S·heads, D, N); the positional map is not yet added to the keys."""
        qkv = self.qkv(x)
        # Concatenated as tokens, which are channels-first in memory even where x is channels-last: q, k and v are then
        # views, and batch and heads fold into one dimension for the matrix products without a copy. The channels are
        # ordered by head, then q, k, v, as in the released checkpoints.
        multi_scale = torch.cat([qkv.flatten(2), self.aggregate(qkv).flatten(2)], 1)
        q, k, v = multi_scale.unflatten(1, (-1, 3, self.head_dim)).unbind(2)
        return q, k, v

    def position(self, size: torch.Size) -> Tensor:
        """The positional map resized to ``size`` (H, W), as (1, S·heads, D, N); bit-exact at its own size."""
        assert self.pos_embed is not None
        resized: Tensor = self.pos_embed
        # At its own size, bicubic interpolation is the identity but takes 0.3 ms on a CPU. A graph for all sizes has
        # symbolic sizes, which must not be compared: the comparison would specialise the graph to its outcome.
        if any(isinstance(side, torch.SymInt) for side in size) or size != resized.shape[-2:]:
            resized = F.interpolate(resized, size=size, mode="bicubic", align_corners=False)
        # Converting a network to channels-last also converts the parameter, but keys are channels-first in memory.
        return resized.contiguous().flatten(2).unflatten(1, (-1, self.head_dim))

    def shortcut(self, v: Tensor) -> Tensor:
        """GELU(BN(v)) of (B, S·heads, D, N), same shape out; all heads share the statistics of the D channels."""
        assert self.shortcut_norm is not None
        return self.shortcut_act(self.shortcut_norm(v.flatten(0, 1))).unflatten(0, v.shape[:2])

    @torch.no_grad()
    def fuse(self) -> "MultiScaleAttention":
        """Replace the shortcut's BatchNorm by one multiplication and addition, in place; returns the module.

        timm's ``reparameterize_model`` calls this method too.
        """
        if isinstance(self.shortcut_norm, nn.BatchNorm1d) and self.shortcut_norm.track_running_stats:
            self.shortcut_norm = ChannelAffine(self.shortcut_norm)
        return self


class MaskedSoftmaxResidual(nn.Module):
    """Adds `qtvit.ops.masked_softmax_attention_cf` to the output in training, nothing in evaluation (paper, Table 7).

    Args:
        threshold: softmax weights up to it are masked out; 0.02 in Castling-ViT's code.

    Raises:
        ValueError: ``threshold`` is not between 0 and 1.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"softmax_residual is a threshold between 0 and 1 such as 0.02, got {threshold}")
        self.threshold = threshold

    def forward(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return out + masked_softmax_attention_cf(q, k, v, self.threshold) if self.training else out


class ChannelAffine(nn.Module):
    """A BatchNorm with frozen running statistics as one multiplication and addition: (B, D, N), same shape out."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.scale = nn.Buffer(scale.unsqueeze(1))
        self.offset = nn.Buffer(torch.addcmul(norm.bias, norm.running_mean, scale, value=-1).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.offset, x, self.scale)


class LinearAttention(nn.Module):
    """Self-attention with a linear kernel, for timm's transformers: (B, N, C) -> (B, N, C).

    Used as in ``timm.create_model("deit_small_patch16_224", img_size=1024, attn_layer=LinearAttention)``. timm wants a
    class there; for another kernel, make a subclass with ``kernel = "relu"`` in it. Parameters have the names of
    ``timm.layers.Attention``, whose weights load (with ``strict=False`` for a kernel with scalars, which they lack).

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: heads of D = C // num_heads channels.
        qkv_bias, proj_bias: whether the linear layers have biases.
        qk_norm: whether ``norm_layer(D)`` is applied to queries and keys.
        scale_norm: whether ``norm_layer(C)`` is applied before the projection.
        attn_drop: must be 0, because linear attention forms no weights that could be dropped.
        proj_drop: dropout rate after the projection.
        norm_layer: makes the norms of ``qk_norm`` and ``scale_norm``.
        kernel: a name in ``qtvit.ops.KERNELS``; None: the class's own.
        device, dtype: as for any ``torch.nn`` module.

    Raises:
        ValueError: the kernel is unknown, ``dim`` is not a multiple of ``num_heads``, ``attn_drop`` is not 0, or there
            is no ``norm_layer`` for ``qk_norm`` or ``scale_norm``; in ``forward``, a mask is given.
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
