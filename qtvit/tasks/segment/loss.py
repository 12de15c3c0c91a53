"""What a segmentation network is trained to make small; pixels that are of no class never count."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SegmentationLoss(nn.Module):
    """Cross-entropy of pixels, and Dice loss if it has a weight.

    Args:
        ignore_index: the label of pixels that do not count.
        class_weights: (C,), of the pixels of each class; None for equal ones. Dice weighs classes equally by itself.
        ohem: whether cross-entropy is of hard pixels only, see `hard_pixels`.
        threshold, min_kept: of `hard_pixels`.
        dice_weight: what the Dice loss is multiplied with before it is added.

    Raises:
        ValueError: weights that are negative or not finite, a threshold that is no probability, no pixel kept.
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
        """The mean over the pixels that count, by their weights."""
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

    Online hard example mining as in OCNet (Yuan and Wang, 2018): the hardest are ``min_kept`` pixels for each image
    of the batch, or all that there are, drawn from the whole batch. Pixels as hard as the last of them are in too.
    """
    counted = labels != ignore_index
    own = torch.where(counted, labels, 0)[:, None]
    probability = logits.softmax(1).gather(1, own)[:, 0]
    candidates = probability[counted]
    num_kept = min(min_kept * len(labels), candidates.numel())
    hard = candidates < threshold
    if num_kept > hard.sum():
        limit = candidates.sort().values[num_kept - 1]
        return counted & (probability <= limit)
    return counted & (probability < threshold)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """1 - 2 Σ p t / (Σ p + Σ t), the mean over the classes that the batch has; 0 if no pixel counts.

    p are the probabilities of a class and t its pixels, over the whole batch. As in V-Net (Milletari et al., 2016),
    but for the squares in its denominator.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W).
        ignore_index: the label of pixels that do not count.
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
    """(C,) weights for classes with (C,) ``num_pixels``, so that each counts the same in all, and a pixel 1 on average.

    A class without pixels has weight 0.
    """
    present = num_pixels > 0
    weights = num_pixels.sum() / (present.sum() * num_pixels.clamp_min(1).double())
    return torch.where(present, weights, 0.0).float()
