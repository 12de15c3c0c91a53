"""Semantic segmentation: a backbone, a head on the feature maps of its last stages, and an auxiliary head for training.

Shapes: B batch, C channels, H x W image or feature map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.errors import unknown_name
from qtvit.layers import ConvNormAct, MBConv, Residual
from qtvit.models.backbone import Backbone, OnBackbone
from qtvit.models.build import build_model
from qtvit.ops.attention import full_precision

AUX_WEIGHT = 0.4
"""Weight of the auxiliary head's loss; that of the main head's loss is 1."""
POOL_BINS = (1, 2, 3, 6)
"""Bins per side of the grids that pyramid pooling averages over."""


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate maps bilinearly to ``size`` (H, W); they cover the image from edge to edge before and after."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def average_bins(x: Tensor, bins: int) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d(x, bins)``: (B, C, H, W) -> (B, C, bins, bins).

    PyTorch's own operation is exported with a fixed input size. This one multiplies with two matrices that are made in
    the graph, so that exported files take images of any size. Sums run in fp32, even under autocast.
    """
    with full_precision(x) as upcast:
        wide = upcast(x)
        rows, columns = (_bin_weights(bins, side, wide) for side in x.shape[-2:])
        return (rows @ (wide @ columns.mT)).to(x.dtype)


def _bin_weights(bins: int, side: int, like: Tensor) -> Tensor:
    """(bins, side) matrix; row i averages the pixels that overlap the i-th of ``bins`` equal parts of ``side``."""
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    pixel = torch.arange(side, device=like.device)
    overlap = ((i * side < (pixel + 1) * bins) & (pixel * bins < (i + 1) * side)).to(like.dtype)
    return overlap / overlap.sum(1, keepdim=True)


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1×1 convolution to logits: (B, C, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, in_chans: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(drop_rate)
        self.conv = nn.Conv2d(in_chans, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


class PyramidPooling(nn.Module):
    """Fuses a feature map with its averages over grids of `POOL_BINS` a side: (B, in_chans, H, W) -> (B, channels, H,
    W).

    Raises:
        ValueError: in ``forward``, training on a batch of 1, whose average over the whole map BatchNorm cannot
            normalise (its running statistics would become non-finite).
    """

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvNormAct(in_chans, channels, 1, act="relu") for _ in POOL_BINS)
        self.fuse = ConvNormAct(in_chans + len(POOL_BINS) * channels, channels, 3, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        if any(type(m) is nn.BatchNorm2d and m.training for m in self.branches.modules()) and len(x) == 1:
            raise ValueError("UPerNet is trained in batches of 2 images or more, got 1: its BatchNorms need that")
        pooled = [branch(average_bins(x, bins)) for bins, branch in zip(POOL_BINS, self.branches, strict=True)]
        return self.fuse(torch.cat([x, *(resize(bins, x.shape[-2:]) for bins in pooled)], 1))


class UPerHead(nn.Module):
    """UPerNet's head: pyramid pooling of the coarsest map, a feature pyramid, all levels fused at the finest size.

    "Unified Perceptual Parsing for Scene Understanding", Xiao et al., ECCV 2018.

    Args:
        in_chans: channels of the feature maps, the finest first.
        num_classes: number of logits per pixel.
        channels: channels of all feature maps within the head.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, in_chans: Sequence[int], num_classes: int, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.pool = PyramidPooling(in_chans[-1], channels)
        self.laterals = nn.ModuleList(ConvNormAct(chans, channels, 1, act="relu") for chans in in_chans[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3, act="relu") for _ in in_chans[:-1])
        self.fuse = ConvNormAct(len(in_chans) * channels, channels, 3, act="relu")
        self.classifier = PixelClassifier(channels, num_classes, drop_rate)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps, the finest first -> (B, num_classes, H, W) at the size of the finest."""
        levels = [self.pool(features[-1])]
        for lateral, x in zip(reversed(self.laterals), reversed(features[:-1]), strict=True):
            levels.insert(0, lateral(x) + resize(levels[0], x.shape[-2:]))
        levels = [*(conv(x) for conv, x in zip(self.smooth, levels[:-1], strict=True)), levels[-1]]
        size = levels[0].shape[-2:]
        return self.classifier(self.fuse(torch.cat([levels[0], *(resize(x, size) for x in levels[1:])], 1)))


class LightHead(nn.Module):
    """A head for real-time use, after EfficientViT-Seg's: feature maps summed at the finest size, then a few MBConvs.

    Args:
        in_chans, num_classes, drop_rate: as for `UPerHead`.
        channels: channels of the sum.
        depth: number of MBConvs.
    """

    def __init__(
        self, in_chans: Sequence[int], num_classes: int, channels: int, drop_rate: float, depth: int = 3
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(ConvNormAct(chans, channels, 1) for chans in in_chans)
        mbconvs = [MBConv(channels, channels, norm_eps=1e-5, act="hard_swish") for _ in range(depth)]
        self.blocks = nn.Sequential(*(Residual(mbconv, nn.Identity()) for mbconv in mbconvs))
        self.expand = ConvNormAct(channels, 4 * channels, 1, act="hard_swish")
        self.classifier = PixelClassifier(4 * channels, num_classes, drop_rate)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps, the finest first -> (B, num_classes, H, W) at the size of the finest."""
        return self.classifier(self.expand(self.fuse(features)))

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps, the finest first -> (B, channels, H, W) at the size of the finest."""
        finest, *others = (lateral(x) for lateral, x in zip(self.laterals, features, strict=True))
        for x in others:
            finest = finest + resize(x, finest.shape[-2:])
        return self.blocks(finest)


class LightSkipHead(LightHead):
    """A `LightHead` whose sum is added to a feature map of twice its size, for sharp borders and small objects.

    DeepLabv3+ (Chen et al., ECCV 2018) has such a skip connection from an early layer. Few layers follow it, because
    they work on four times as many positions. ``in_chans`` starts with the channels of that finer map; the other
    arguments are those of `LightHead`.
    """

    def __init__(
        self, in_chans: Sequence[int], num_classes: int, channels: int, drop_rate: float, depth: int = 3
    ) -> None:
        super().__init__(in_chans[1:], num_classes, channels, drop_rate, depth)
        self.skip = ConvNormAct(in_chans[0], channels, 1)
        self.expand = ConvNormAct(channels, 2 * channels, 1, act="hard_swish")
        self.classifier = PixelClassifier(2 * channels, num_classes, drop_rate)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps, the finest first -> (B, num_classes, H, W) at the size of the finest."""
        finer, *features = features
        return self.classifier(self.expand(self.skip(finer) + resize(self.fuse(features), finer.shape[-2:])))


class FCNHead(nn.Sequential):
    """The auxiliary head: a 3×3 convolution and a classifier, (B, in_chans, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, in_chans: int, num_classes: int, drop_rate: float, channels: int = 256) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_chans, channels, 3, act="relu")
        self.classifier = PixelClassifier(channels, num_classes, drop_rate)


HEADS: dict[str, tuple[type[UPerHead | LightHead], int]] = {
    "upernet": (UPerHead, 4),
    "light": (LightHead, 3),
    "light_skip": (LightSkipHead, 4),
}
"""Heads by name, with the number of last stages whose feature maps each takes (all, if the backbone has fewer)."""


class Segmenter(OnBackbone, nn.Module):
    """A backbone with a head that classifies every pixel; `build_segmenter` builds it.

    Args:
        backbone: turns images into a list of feature maps, the finest first.
        head: turns the feature maps into logits.
        aux: turns the second-coarsest feature map into logits in training; None: no auxiliary head.
        num_classes: number of logits per pixel.
        in_chans: image channels.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module, aux: nn.Module | None, num_classes: int, in_chans: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.aux = aux
        self.num_classes = num_classes
        self.in_chans = in_chans

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """The logits of normalised images (B, in_chans, H, W) of any size.

        Returns:
            In evaluation, (B, num_classes, H, W). In training, ``{"out": …, "aux": …}`` (the latter if there is an
            auxiliary head) at the heads' own resolutions: at full size, the logits of 16 images of 512 x 512 px for 150
            classes take 2.5 GB, and a loss keeps several such tensors.
        """
        features = self.backbone(images)
        logits = self.head(features)
        if not self.training:
            return resize(logits, images.shape[-2:])
        return {"out": logits} if self.aux is None else {"out": logits, "aux": self.aux(features[-2])}


def build(name: str, model_args: Mapping[str, Any], task_args: Mapping[str, Any]) -> nn.Module:
    """The segmenter that a model file describes.

    ``task_args`` are ``masks``, which says what the values in masks mean, and the options of `build_segmenter`.
    """
    heads = dict(task_args)
    return build_segmenter(name, num_classes=len(heads.pop("masks")["values"]), model_args=model_args, **heads)


def build_segmenter(
    model: str,
    *,
    num_classes: int,
    head: str = "upernet",
    aux: bool = True,
    channels: int | None = None,
    drop_rate: float = 0.1,
    model_args: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Build a network for semantic segmentation.

    With ``head="upernet"`` and 150 classes, QT-ViT-1, 2 and 3 have the 32.8, 44.3 and 69.7 M parameters of the paper's
    Table 6 if the auxiliary head is not counted: the backbone with its positional maps for 224 px, and UPerNet with 512
    channels on the feature maps of strides 4 to 32. The auxiliary head adds 0.3 to 0.6 M, in training only.

    Args:
        model: name of the backbone, as for ``timm.create_model``.
        num_classes: number of logits per pixel.
        head: a name in `HEADS`.
        aux: whether to add an auxiliary head on the second-coarsest of the head's feature maps.
        channels: channels of the head; None: 512 for UPerNet, and for a light head those of the finest map that it
            sums.
        drop_rate: dropout before the classifiers.
        model_args: arguments of the network for ``timm.create_model``; those of its classifier have no effect.

    Raises:
        ValueError: unknown names, arguments that the model does not take, numbers below 1, or too few feature maps.
    """
    if head not in HEADS:
        raise unknown_name("head", head, HEADS)
    if num_classes < 1 or (channels is not None and channels < 1):
        raise ValueError(f"num_classes and channels are 1 or more, got {num_classes} and {channels}")
    head_class, num_maps = HEADS[head]
    skips = head_class is LightSkipHead
    backbone = Backbone(build_model(model, **(model_args or {})), num_maps, full_resolution=skips)
    in_chans = backbone.channels
    if len(in_chans) < 2 and skips:
        raise ValueError(f"{model} gives one feature map, and the head light_skip needs two")
    if len(in_chans) < 2 and aux:
        raise ValueError(f"{model} gives one feature map, and an auxiliary head needs two: --loss.aux 0 is without one")
    if channels is None:
        channels = 512 if head == "upernet" else in_chans[1 if skips else 0]
    return Segmenter(
        backbone,
        head_class(in_chans, num_classes, channels, drop_rate),
        FCNHead(in_chans[-2], num_classes, drop_rate) if aux else None,
        num_classes,
        (model_args or {}).get("in_chans", 3),
    )
