"""The network as it is deployed: what is constant once training is over is worked out beforehand.

Shapes: B batch, C channels, H x W feature map.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.layers import ConvNormAct, MultiScaleAttention


@torch.no_grad()
def fuse(model: nn.Module, img_size: tuple[int, int] | None = None, *, eager_cpu: bool = False) -> nn.Module:
    """A copy of ``model`` for inference, with the same outputs up to rounding and fewer operations.

    BatchNorms are folded into the convolutions before them, that of the attention's shortcut into a scale and an
    offset, and positional maps are resized for ``img_size``, (H, W); at other sizes they are resized from there, so
    for several sizes leave it out. Parts that are not ours stay as they are; a model without any comes back as a copy.
    It can be cast to bf16 or fp16: norms, sums over tokens and the division still run in fp32.

    Args:
        model: the network, which is left as it is.
        img_size: see above.
        eager_cpu: also replace 1×1 convolutions by `Pointwise` and activate in place, which saves 5 to 15 % of the time
            of eager PyTorch on a CPU. Compilers and the runtimes of exported files do as much by themselves.

    Raises:
        ValueError: ``img_size`` has a side below 1.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    sizes = {} if img_size is None else _map_sizes(fused, img_size)
    for name, module in fused.named_modules():
        if isinstance(module, (ConvNormAct, MultiScaleAttention)):
            module.fuse()
        if isinstance(module, MultiScaleAttention) and module.pos_embed is not None and name in sizes:
            resized = module.position(sizes[name]).reshape(1, -1, *sizes[name])
            module.pos_embed = nn.Parameter(resized.clone(), requires_grad=False)
    if eager_cpu:
        _speed_up_on_cpu(fused)
    return fused


class Pointwise(nn.Module):
    """A 1×1 convolution as a matrix product: (B, C, H, W), in and out in the same memory format.

    PyTorch's convolution copies its weights to another layout at each call on a CPU.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.matrix = nn.Buffer(conv.weight.flatten(1))
        self.bias = None if conv.bias is None else nn.Buffer(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if tokens.is_contiguous():
            matrices = self.matrix.expand(len(x), -1, -1)
            out = matrices @ tokens if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), matrices, tokens)
        else:  # in channels-last, channels are the last dimension of the product too
            out = F.linear(tokens.mT, self.matrix, self.bias).mT
        return out.unflatten(2, x.shape[2:])


class GroupedPointwise(nn.Module):
    """A 1×1 convolution in groups, without bias, as one batched matrix product: (B, C, H, W), same out."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.matrices = nn.Buffer(conv.weight.view(conv.groups, -1, conv.weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).unflatten(1, (len(self.matrices), -1))
        return (self.matrices @ tokens).flatten(1, 2).unflatten(2, x.shape[2:])


def _speed_up_on_cpu(fused: nn.Module) -> None:
    for name, module in list(fused.named_modules()):
        if isinstance(module, ConvNormAct):
            if type(module.conv) is nn.Conv2d and _is_pointwise(module.conv):
                fused.set_submodule(f"{name}.conv".removeprefix("."), Pointwise(module.conv))
            if hasattr(module.act, "inplace"):
                module.act.inplace = True
        elif isinstance(module, MultiScaleAttention) and type(module.qkv) is nn.Conv2d:
            grouped = module.aggregate[1]
            assert isinstance(grouped, nn.Conv2d)
            fused.set_submodule(f"{name}.qkv", Pointwise(module.qkv))
            fused.set_submodule(f"{name}.aggregate.1", GroupedPointwise(grouped))


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1


def _map_sizes(model: nn.Module, img_size: tuple[int, int]) -> dict[str, torch.Size]:
    """The (H, W) at which each attention layer sees an image of ``img_size``, by its name."""
    if min(img_size) < 1:
        raise ValueError(f"img_size must be 1 x 1 or more, got {img_size[0]} x {img_size[1]}")
    sizes: dict[str, torch.Size] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: sizes.update({name: output.shape[-2:]})

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MultiScaleAttention)]
    hooks = [module.register_forward_hook(remember(name)) for name, module in layers]
    try:
        first = next(model.parameters())
        chans = getattr(model, "in_chans", 3)
        model(torch.zeros(1, chans, *img_size, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
