"""The loss of a segmentation network; pixels without a class never count."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SegmentationLoss(nn.Module):
    """Cross-entropy of pixels, plus the Dice loss if it has a weight.

    Args:
        ignore_index: the label of pixels that do not count.
        class_weights: (C,) weights of the classes in the cross-entropy; None for equal ones. Dice weights classes
            equally by itself.
        ohem: whether the cross-entropy is of hard pixels only, see `hard_pixels`.
        threshold, min_kept: arguments of `hard_pixels`.
        dice_weight: factor of the Dice loss.

    Raises:
        ValueError: weights are negative or not finite, the threshold is no probability, or no pixel is kept.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        *,
        class_weights: Tensor | None = None,
        ohem: bool = False,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        dice_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and not (class_weights.isfinite().all() and (class_weights >= 0).all()):
            raise ValueError(f"class weights must be finite and not negative, got {class_weights.tolist()}")
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of OHEM is a probability above 0, got {threshold}")
        if min_kept < 1:
            raise ValueError(f"OHEM keeps 1 pixel of an image or more, got {min_kept}")
        if not 0 <= dice_weight < float("inf"):
            raise ValueError(f"the weight of the Dice loss must be finite and not negative, got {dice_weight}")
        self.ignore_index = ignore_index
        self.ohem = ohem
        self.threshold = threshold
        self.min_kept = min_kept
        self.dice_weight = dice_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of (B, C, h, w) logits, resized to the (B, H, W) labels, in fp32; 0 if no pixel counts."""
        logits = logits.float()
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = self._cross_entropy(logits, labels)
        return loss + self.dice_weight * dice_loss(logits, labels, self.ignore_index) if self.dice_weight else loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the pixels that count, by the weights of their classes."""
        losses = F.cross_entropy(logits, labels, self.class_weights, ignore_index=self.ignore_index, reduction="none")
        counted = labels != self.ignore_index
        if self.ohem:
            counted = hard_pixels(logits.detach(), labels, self.ignore_index, self.threshold, self.min_kept)
        weights = counted.to(losses.dtype)
        losses = losses * weights
        if self.class_weights is not None:
            weights = weights * self.class_weights[torch.where(counted, labels, 0)]
        return losses.sum() / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)


def hard_pixels(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float, min_kept: int) -> Tensor:
    """(B, H, W), true for pixels whose own class has a probability below ``threshold``, or that are among the hardest.

    Online hard example mining as in OCNet (Yuan and Wang, 2018): the hardest are ``min_kept`` pixels per image of the
    batch, or as many as there are, chosen from the whole batch; pixels as hard as the last of them are included.
    """
    counted = labels != ignore_index
    probability = logits.softmax(1).gather(1, torch.where(counted, labels, 0)[:, None])[:, 0]
    candidates = probability[counted]
    num_kept = min(min_kept * len(labels), candidates.numel())
    if num_kept > (candidates < threshold).sum():
        return counted & (probability <= candidates.sort().values[num_kept - 1])
    return counted & (probability < threshold)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """1 - 2 Σ p t / (Σ p + Σ t), averaged over the classes that the batch has; 0 if no pixel counts.

    p are the probabilities of a class and t its pixels (0 or 1), over the whole batch. As in V-Net (Milletari et al.,
    2016), except that its denominator has squares. Takes logits (B, C, H, W) and labels (B, H, W).
    """
    counted = labels != ignore_index
    own = torch.where(counted, labels, 0)
    probabilities = logits.float().softmax(1) * counted[:, None]
    num_classes = logits.shape[1]
    pixels = F.one_hot(own[counted], num_classes).sum(0) if counted.any() else own.new_zeros(num_classes)
    matched = probabilities.gather(1, own[:, None])[:, 0]
    overlap = matched.new_zeros(num_classes).index_add(0, own.flatten(), matched.flatten())
    dice = 2 * overlap / (probabilities.sum((0, 2, 3)) + pixels).clamp_min(torch.finfo(matched.dtype).tiny)
    present = (pixels > 0).to(dice.dtype)
    return ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def balanced_weights(num_pixels: Tensor) -> Tensor:
    """(C,) weights for classes with (C,) ``num_pixels``: each class counts the same in total, and a pixel 1 on average.

    A class without pixels has weight 0.
    """
    present = num_pixels > 0
    weights = num_pixels.sum() / (present.sum() * num_pixels.clamp_min(1).double())
    return torch.where(present, weights, 0.0).float()
