"""Eager inference with fewer passes over the feature map; what a compiler or a deployed graph does by itself.

BatchNorm is folded into the weights of its convolution at each call, which are few next to a map; a pointwise
convolution is one matrix product, for which PyTorch's convolution on the CPU would copy its weights to another layout
at each call; and hard-swish works in place.

Shapes: B batch, C channels, H x W the feature map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.ops.attention import AUTOCAST_DEVICES


def is_eager_inference(x: Tensor, *modules: nn.Module) -> bool:
    """Whether ``modules`` on ``x`` may be replaced by something equal: plain fp32 tensors, no gradients, no tracing, no
    autocast, and nobody listens to the modules.
    """
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not (x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type))
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.nn.modules.module._has_any_global_hook()
        and all(_is_plain(module) for module in modules)
    )


def conv_norm_act(x: Tensor, conv: nn.Conv2d, *following: nn.Module, channels_last: bool | None = None) -> Tensor:
    """(B, C, H, W) through a convolution and what follows it: BatchNorm and/or an activation, or nothing.

    ``channels_last`` is the memory format of a pointwise convolution's output; None: that of x.
    """
    weight, bias = conv.weight, conv.bias
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    if following and _is_frozen_norm(following[0]) and positions > weight[0].numel():
        weight, bias = fold_norm(weight, bias, following[0])
        following = following[1:]
    if weight.shape[-2:] == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and x.device.type == "cpu":
        if channels_last is None:
            channels_last = x.is_contiguous(memory_format=torch.channels_last)
        x = pointwise(x, weight, bias, channels_last)
    else:
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    for module in following:
        x = F.hardswish(x, inplace=True) if type(module) is nn.Hardswish else module(x)
    return x


def grouped_pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """1×1 convolution in groups of a contiguous (B, C, H, W), as one batched matrix product."""
    tokens = x.flatten(2).unflatten(1, (groups, -1))
    return (weight.view(groups, -1, tokens.shape[2]) @ tokens).flatten(1, 2).unflatten(2, x.shape[2:])


def norm_as_affine(x: Tensor, norm: Any) -> Tensor:
    """(B, C, N) through a BatchNorm as one multiplication and addition, which PyTorch's does slowly to views."""
    if not _is_frozen_norm(norm):
        return norm(x)
    scale, offset = fold_norm(torch.ones_like(norm.weight), None, norm)
    return torch.addcmul(offset.unsqueeze(1), x, scale.unsqueeze(1))


def fold_norm(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """The weight (C, …) and bias of a layer, with BatchNorm's running statistics and affine map behind it."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    offset = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), offset if bias is None else offset + bias * scale


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """1×1 convolution of (B, C, H, W) in either memory format, its output in the one that is asked for."""
    matrix, tokens = weight.flatten(1), x.flatten(2)
    if channels_last:
        return F.linear(tokens.mT, matrix, bias).mT.unflatten(2, x.shape[2:])
    matrices = matrix.expand(len(x), -1, -1)
    out = matrices.bmm(tokens) if bias is None else torch.baddbmm(bias.unsqueeze(1), matrices, tokens)
    return out.unflatten(2, x.shape[2:])


def _is_frozen_norm(module: Any) -> bool:
    is_norm = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
    return is_norm and not module.training and module.running_var is not None and bool(module.affine)


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody listens to ``module``, and if it is a convolution, it is no subclass and pads with zeros."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return not isinstance(module, nn.Conv2d) or (type(module) is nn.Conv2d and module.padding_mode == "zeros")
