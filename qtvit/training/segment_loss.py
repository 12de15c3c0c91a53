"""Losses of semantic segmentation. Ignored pixels count in none of them.

Shapes: B batch, C classes, H x W labels, h x w logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qtvit.data import SegmentationSample
from qtvit.data.broken import for_each_image
from qtvit.data.masks import MaskClasses, count_values, read_mask
from qtvit.models.segmentation import resize

from .segment_config import LossConfig

MAX_WEIGHT = 10.0
"""Of a rare class, next to 1 on average."""


def segmentation_loss(
    logits: Tensor, labels: Tensor, config: LossConfig, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """The loss of a batch: cross-entropy, of all pixels or the hard ones, and ``config.dice`` times the Dice loss.

    Logits are resized to the labels' size image by image, and again in the backward pass, so that memory never holds
    those of a whole batch: at 512 px, 150 classes are 157 MB an image.

    Args:
        logits: (B, C, h, w).
        labels: (B, H, W) int64.
        config: which loss.
        ignore_index: label of pixels of no class.
        class_weights: (C,) weights of the cross-entropy.
    """
    parts = [
        checkpoint(_image_terms, one.unsqueeze(0), label, ignore_index, config.dice > 0, use_reentrant=False)
        for one, label in zip(logits, labels, strict=True)
    ]
    losses, *areas = (torch.stack(terms) for terms in zip(*parts, strict=True))
    loss = _cross_entropy(losses, labels, config, ignore_index, class_weights)
    if config.dice:
        loss = loss + config.dice * dice_loss(*(area.sum(0) for area in areas))
    return loss


def _image_terms(logits: Tensor, labels: Tensor, ignore_index: int, dice: bool) -> tuple[Tensor, ...]:
    """Of an image: (H, W) cross-entropies, and for ``dice`` the last three arguments of `dice_loss`."""
    log_probabilities = resize(logits.float(), labels.shape).log_softmax(1)
    losses = F.nll_loss(log_probabilities, labels.unsqueeze(0), ignore_index=ignore_index, reduction="none")[0]
    if not dice:
        return (losses,)
    counted = labels != ignore_index
    num_classes = logits.shape[1]
    targets = F.one_hot(labels[counted], num_classes).float()
    probabilities = log_probabilities[0].movedim(0, -1)[counted].exp()
    return losses, (probabilities * targets).sum(0), probabilities.sum(0), targets.sum(0)


def _cross_entropy(
    losses: Tensor, labels: Tensor, config: LossConfig, ignore_index: int, class_weights: Tensor | None
) -> Tensor:
    """The weighted mean of the (B, H, W) losses of the pixels that count; 0 if there are none."""
    counted = labels != ignore_index
    if config.kind == "ohem":
        counted = counted & _hard(losses.detach(), counted, config)
    weights = counted.float()
    if class_weights is not None:
        weights = weights * class_weights[labels.where(counted, 0)]
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def _hard(losses: Tensor, counted: Tensor, config: LossConfig) -> Tensor:
    """The pixels whose class has a probability below the threshold; at least a part of the batch's, the worst."""
    given = losses[counted]
    if not len(given):
        return counted
    kept = max(int(config.ohem_min_kept * len(given)), 1)
    worst = given.topk(kept).values[-1]
    threshold = -torch.tensor(config.ohem_threshold, device=losses.device).log()
    return losses >= torch.minimum(worst, threshold)


def dice_loss(inside: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """1 - 2 · |P ∩ T| / (|P| + |T|), the mean over the classes that are there; 0 if there are none.

    Args:
        inside, predicted, true: (C,) probability of each class in its own pixels, in all pixels, and its pixels.
    """
    losses = 1 - (2 * inside + 1) / (predicted + true + 1)
    present = (true > 0).float()
    return (losses * present).sum() / present.sum().clamp_min(1)


def balanced_weights(samples: Sequence[SegmentationSample], meaning: MaskClasses, num_threads: int = 8) -> Tensor:
    """(C,) weights of the cross-entropy: all pixels / (C · those of the class), at most `MAX_WEIGHT`."""

    def count(sample: SegmentationSample) -> Tensor:
        return torch.from_numpy(meaning.label_counts(meaning.plain(count_values(read_mask(sample.mask)))))

    counts = torch.stack(list(for_each_image(count, samples, num_threads))).sum(0)
    return (counts.sum() / (len(counts) * counts.clamp_min(1))).clamp_max(MAX_WEIGHT).float()
