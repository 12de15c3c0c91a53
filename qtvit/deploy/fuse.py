"""The network as it is deployed: what is constant once training is over is worked out beforehand."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from qtvit.layers import ConvNormAct, MultiScaleAttention


@torch.no_grad()
def fuse(model: nn.Module, img_size: tuple[int, int] | None = None) -> nn.Module:
    """A copy of ``model`` for inference, with the same outputs up to rounding and fewer operations.

    BatchNorms are folded into the convolutions before them, that of the attention's shortcut into a scale and an
    offset, and positional maps are resized for ``img_size``, (H, W); at other sizes they are resized from there, so
    for several sizes leave it out. Parts that are not ours stay as they are; a model without any comes back as a copy.
    It can be cast to bf16 or fp16: norms, sums over tokens and the division still run in fp32.

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
    return fused


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
