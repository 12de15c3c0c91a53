"""The convolutional blocks of EfficientViT's two families.

Every block maps (B, in_chans, H, W) to (B, out_chans, ceil(H / stride), ceil(W / stride)). The last convolution of a
block is followed by a norm but no activation, nor is the sum of a residual block activated. In a "fewer norm" block
(``fewer_norm=True``), the inner convolutions have a bias and no norm.
"""

from functools import partial

import torch
from timm.layers import create_act_layer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class ConvNormAct(nn.Module):
    """Convolution, BatchNorm, activation.

    Args:
        in_chans, out_chans, kernel_size, stride, groups: as for ``nn.Conv2d``; the padding keeps H and W at stride 1.
        norm_eps: eps of the BatchNorm; None: the convolution has a bias instead of a norm.
        act: name of the activation, as in ``timm.layers``; None: no activation.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        norm_eps: float | None = 1e-5,
        act: str | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, groups=groups, bias=norm_eps is None)
        self.norm = nn.Identity() if norm_eps is None else nn.BatchNorm2d(out_chans, eps=norm_eps)
        self.act = nn.Identity() if act is None else create_act_layer(act, inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x)
        x = self.act(x)
        return x

    @torch.no_grad()
    def fuse(self) -> "ConvNormAct":
        """Fold the BatchNorm with its running statistics into the convolution, in place; returns the module.

        timm's ``reparameterize_model`` calls this method too. If a user has replaced the norm or the convolution by
        another type of module, nothing is folded.
        """
        conv, norm = self.conv, self.norm
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats and type(conv) is nn.Conv2d:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            self.norm = nn.Identity()
        return self


class DSConv(nn.Sequential):
    """Depthwise-separable convolution: a depthwise 3×3, then a pointwise 1×1."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1, norm_eps: float, act: str) -> None:
        super().__init__()
        self.depth_conv = ConvNormAct(in_chans, in_chans, 3, stride=stride, groups=in_chans, norm_eps=norm_eps, act=act)
        self.point_conv = ConvNormAct(in_chans, out_chans, 1, norm_eps=norm_eps)


class ConvPair(nn.Sequential):
    """Two 3×3 convolutions with an activation between them."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1, norm_eps: float, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, out_chans, 3, stride=stride, norm_eps=norm_eps, act=act)
        self.conv2 = ConvNormAct(out_chans, out_chans, 3, norm_eps=norm_eps)


class MBConv(nn.Sequential):
    """Inverted bottleneck: pointwise 1×1 to ``expand`` times the channels, depthwise 3×3, pointwise 1×1."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        *,
        stride: int = 1,
        expand: int = 4,
        fewer_norm: bool = False,
        norm_eps: float,
        act: str,
    ) -> None:
        super().__init__()
        mid = in_chans * expand
        inner = partial(ConvNormAct, norm_eps=None if fewer_norm else norm_eps, act=act)
        self.inverted_conv = inner(in_chans, mid, 1)
        self.depth_conv = inner(mid, mid, 3, stride=stride, groups=mid)
        self.point_conv = ConvNormAct(mid, out_chans, 1, norm_eps=norm_eps)


class FusedMBConv(nn.Sequential):
    """Inverted bottleneck with one dense 3×3 in place of MBConv's expansion and depthwise convolution."""

    def __init__(
        self, in_chans: int, out_chans: int, *, stride: int = 1, expand: int = 4, norm_eps: float, act: str
    ) -> None:
        super().__init__()
        mid = in_chans * expand
        self.spatial_conv = ConvNormAct(in_chans, mid, 3, stride=stride, norm_eps=norm_eps, act=act)
        self.point_conv = ConvNormAct(mid, out_chans, 1, norm_eps=norm_eps)


class Residual(nn.Module):
    """Residual block: x + drop_path(main(x))."""

    def __init__(self, main: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.main(x))
