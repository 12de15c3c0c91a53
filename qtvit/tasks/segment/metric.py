"""Counts a segmentation network's predictions over all processes; `qtvit.tasks.segment.scores` computes scores."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from .scores import SegmentationScores, count_confusion


class SegmentationConfusion(Metric):
    """Counts pixels, true class by predicted class, over images of any size and over all processes.

    It takes predicted classes, not logits, which have to be resized to the mask's size first; see
    `qtvit.tasks.segment.predict.segment_pixels`.

    Args:
        num_classes: C.
        ignore_index: the label of pixels that do not count.
    """

    confusion: Tensor
    num_images: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("num_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add the (B, H, W) or (H, W) predicted and true classes of images of one size."""
        assert predicted.shape == labels.shape
        self.confusion += count_confusion(predicted, labels, self.num_classes, self.ignore_index)
        self.num_images += len(labels) if labels.ndim == 3 else 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """The counts and the number of images of all processes."""
        return self.confusion, self.num_images

    def scores(self, classes: Sequence[str]) -> SegmentationScores:
        """The scores of all images of all processes."""
        confusion, num_images = self.compute()
        return SegmentationScores(classes, confusion.cpu(), int(num_images))
