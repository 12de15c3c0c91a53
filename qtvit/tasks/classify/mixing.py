"""Soft targets, MixUp and CutMix.

Shapes: B images of (C, H, W), N classes.
"""

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B,) labels -> (B, N) float32 probabilities; the part ``smoothing`` is spread evenly over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix every image i of a batch, and its target, with image B - 1 - i, by MixUp, by CutMix or not at all.

    MixUp is from Zhang et al., ICLR 2018, CutMix from Yun et al., ICCV 2019. The recipe draws lambda once per batch but
    a box for each image. No library does: timm's Mixup draws both per batch or both per image, and refuses odd batches;
    torchvision's CutMix has one box. All draws come from torch's global CPU generator, so devices do not differ.

    Args:
        images, targets: (B, C, H, W) and (B, N), floating point. They are not changed; the results have the same
            dtypes and memory formats.
        mixup, cutmix: probabilities that the batch is mixed by MixUp or by CutMix; at most 1 together.
        alpha: parameter above 0 of the distribution Beta(alpha, alpha) of lambda.
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
    """MixUp: ``lam`` times each image and target plus 1 - ``lam`` times those of its partner."""
    return torch.lerp(images.flip(0), images, lam), torch.lerp(targets.flip(0), targets, lam)


def paste(images: Tensor, targets: Tensor, lam: float, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """CutMix: paste a box of its partner into each image, and mix the targets by the area that is covered.

    Args:
        lam: a box has the sides H · sqrt(1 - lam) and W · sqrt(1 - lam) before it is clipped at the border.
        y, x: (B,) centres of the boxes in pixels, on the CPU.
    """
    height, width = images.shape[-2:]
    rows = _span(y, height, lam).to(images.device)
    columns = _span(x, width, lam).to(images.device)
    box = rows[:, None, :, None] & columns[:, None, None, :]
    kept = 1 - rows.sum(1) * columns.sum(1) / (height * width)
    mixed = torch.lerp(targets.flip(0), targets, kept[:, None].to(targets.dtype))
    return torch.where(box, images.flip(0), images), mixed


def _span(center: Tensor, side: int, lam: float) -> Tensor:
    """(B, side) bool, the pixels along one axis that the boxes cover: half a box, rounded down, around the centre."""
    half = int(side * (1 - lam) ** 0.5 / 2)
    distance = torch.arange(side) - center[:, None]
    return (distance >= -half) & (distance < half)
