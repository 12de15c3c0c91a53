"""The convolutional blocks of EfficientViT's two families.

Each block maps (B, in_chans, H, W) to (B, out_chans, ceil(H / stride), ceil(W / stride)) and ends in a norm without
activation: residual sums are not activated. "Fewer norm" blocks (``fewer_norm=True``) have a bias in place of the
inner norms.
"""

from functools import partial
from typing import Any

from timm.layers import create_act_layer
from torch import Tensor, nn

from .eager import conv_norm_act, is_eager_inference
from .lean import is_lean, norm_act, norm_act_conv


class ConvNormAct(nn.Sequential):
    """Convolution with "same" padding, then BatchNorm (or a bias, if ``norm_eps`` is None), then the activation (if
    any).
    """

    recompute_activations = True

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
        if norm_eps is not None:
            self.norm = nn.BatchNorm2d(out_chans, eps=norm_eps)
        if act is not None:
            self.act = create_act_layer(act, inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_eager_inference(x, *self) and isinstance(self.conv, nn.Conv2d):
            return conv_norm_act(x, *self)
        if len(self) < 3 or not self.recompute_activations:
            return super().forward(x)
        return norm_act(self.conv(x), self.norm, self.act)


class ConvBlock(nn.Sequential):
    """Several `ConvNormAct` in a row, which in training keep the outputs of the convolutions alone.

    Their parts are then called across their borders (the activation of one with the convolution of the next), and the
    BatchNorms by their function, so forward hooks on a `ConvNormAct` or an inner BatchNorm run in evaluation only.
    `qtvit.layers.set_recompute_activations` changes that.
    """

    recompute_activations = True

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        norms = [getattr(layer, "norm", None) for layer in layers]
        is_fused = norms[-1] is None  # for inference
        if is_fused or not self.recompute_activations or not is_lean(x, *(norm for norm in norms if norm is not None)):
            return super().forward(x)
        x = layers[0].conv(x)
        for layer, norm, following in zip(layers, norms, layers[1:], strict=False):
            x = norm_act_conv(x, norm, layer.act, following.conv)
        return layers[-1].norm(x)


class DSConv(ConvBlock):
    """Depthwise-separable convolution: depthwise 3×3, pointwise 1×1."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1, norm_eps: float, act: str) -> None:
        super().__init__()
        self.depth_conv = ConvNormAct(in_chans, in_chans, 3, stride=stride, groups=in_chans, norm_eps=norm_eps, act=act)
        self.point_conv = ConvNormAct(in_chans, out_chans, 1, norm_eps=norm_eps)


class ConvPair(ConvBlock):
    """Two 3×3 convolutions, the first activated."""

    def __init__(self, in_chans: int, out_chans: int, *, stride: int = 1, norm_eps: float, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, out_chans, 3, stride=stride, norm_eps=norm_eps, act=act)
        self.conv2 = ConvNormAct(out_chans, out_chans, 3, norm_eps=norm_eps)


class MBConv(ConvBlock):
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


class FusedMBConv(ConvBlock):
    """Inverted bottleneck with one dense 3×3 in place of the expansion and the depthwise convolution."""

    def __init__(
        self, in_chans: int, out_chans: int, *, stride: int = 1, expand: int = 4, norm_eps: float, act: str
    ) -> None:
        super().__init__()
        mid = in_chans * expand
        self.spatial_conv = ConvNormAct(in_chans, mid, 3, stride=stride, norm_eps=norm_eps, act=act)
        self.point_conv = ConvNormAct(mid, out_chans, 1, norm_eps=norm_eps)


class Residual(nn.Module):
    """x + drop_path(main(x))."""

    def __init__(self, main: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.main(x))
