"""Soft targets, and batches mixed by MixUp or CutMix.

Shapes: B images of (C, H, W), N classes.
"""

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B,) labels -> (B, N) float32 probabilities, of which ``smoothing`` is spread evenly over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix every image i of a batch, and its target, with image B - 1 - i; the arguments are left as they are.

    MixUp is of Zhang et al., ICLR 2018, CutMix of Yun et al., ICCV 2019. The recipe draws lambda once a batch, but a
    box for each image: timm's Mixup draws both once or both for each image, and refuses odd batches; torchvision's
    CutMix has one box. The draws come from torch's global generator on the CPU, so they are the same on any device.

    Args:
        images: (B, C, H, W), floating point.
        targets: (B, N) probabilities, floating point.
        mixup: probability that the batch is mixed by MixUp.
        cutmix: probability that it is mixed by CutMix instead; at most 1 - ``mixup``.
        alpha: lambda follows Beta(alpha, alpha); above 0.

    Returns:
        Images and targets, with the shapes, dtypes and memory formats of the arguments.
    """
    choice = torch.rand(()).item()
    if choice >= mixup + cutmix:
        return images, targets
    lam = Beta(alpha, alpha).sample().item()
    if choice < mixup:
        return blend(images, targets, lam)
    batch, _, height, width = images.shape
    return paste(images, targets, lam, torch.randint(height, (batch,)), torch.randint(width, (batch,)))


def blend(images: Tensor, targets: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """MixUp: ``lam`` parts of each image and target, and 1 - ``lam`` parts of its partner's."""
    return torch.lerp(images.flip(0), images, lam), torch.lerp(targets.flip(0), targets, lam)


def paste(images: Tensor, targets: Tensor, lam: float, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """CutMix: put a box of its partner into each image; targets are mixed by the area that is covered.

    Args:
        images, targets: as for `mix`.
        lam: the box has the sides H · sqrt(1 - lam) and W · sqrt(1 - lam), before it is clipped at the border.
        y, x: (B,) pixels around which the boxes lie, on the CPU.
    """
    height, width = images.shape[-2:]
    rows = _span(y, height, lam).to(images.device)
    columns = _span(x, width, lam).to(images.device)
    box = rows[:, None, :, None] & columns[:, None, None, :]
    kept = 1 - rows.sum(1) * columns.sum(1) / (height * width)
    mixed = torch.lerp(targets.flip(0), targets, kept[:, None].to(targets.dtype))
    return torch.where(box, images.flip(0), images), mixed


def _span(center: Tensor, side: int, lam: float) -> Tensor:
    """(B, side) the pixels of one axis that the boxes cover: half a box, rounded down, to either side of the centre."""
    half = int(side * (1 - lam) ** 0.5 / 2)
    distance = torch.arange(side) - center[:, None]
    return (distance >= -half) & (distance < half)
