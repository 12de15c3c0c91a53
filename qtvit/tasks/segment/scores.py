"""Scores of a segmentation network, from the number of pixels of each class that were predicted as each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RegionScores:
    """One class as a row of a table; scores in percent."""

    label: str
    num_pixels: int  # of the class
    iou: float | None  # intersection over union; None for a class that is neither in the masks nor predicted
    accuracy: float | None  # part of the class's pixels that is predicted right; None for a class without pixels
    precision: float | None  # part of the pixels predicted as the class that is of the class; None if there are none
    taken_for: str | None  # the most frequent wrong prediction for the class's pixels
    num_taken: int  # pixels with that prediction


@dataclass(frozen=True)
class SegmentationScores:
    """The scores of a network's predictions for all pixels that have a class.

    Means are over the classes that have a score: a class that is in no mask and is never predicted has no IoU; one that
    is in no mask but is predicted has the IoU 0, and no accuracy.
    """

    classes: Sequence[str]  # C names
    confusion: Tensor  # (C, C) pixels, true class by predicted class
    num_images: int

    def per_class(self) -> list[RegionScores]:
        """The scores of every class, in the order of `classes`."""
        counts = self.confusion
        right, pixels, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        num_taken, taken_for = (counts - right.diag()).max(1)
        columns = (
            self.classes,
            pixels.tolist(),
            _percent(right, pixels + predicted - right),
            _percent(right, pixels),
            _percent(right, predicted),
            [self.classes[i] if n else None for i, n in zip(taken_for.tolist(), num_taken.tolist(), strict=True)],
            num_taken.tolist(),
        )
        return [RegionScores(*row) for row in zip(*columns, strict=True)]

    def mean_iou(self) -> float:
        """mIoU in percent; 0 if nothing was scored."""
        return _mean([row.iou for row in self.per_class()])

    def mean_accuracy(self) -> float:
        """mAcc in percent: the mean of the classes' accuracies."""
        return _mean([row.accuracy for row in self.per_class()])

    def pixel_accuracy(self) -> float:
        """aAcc: the percentage of all pixels that are predicted right."""
        return _percent(self.confusion.diagonal().sum()[None], self.confusion.sum()[None])[0] or 0.0

    def metrics(self) -> dict[str, float]:
        """Mean IoU and accuracies in percent, and the numbers of images and pixels."""
        return {
            "miou": round(self.mean_iou(), 4),
            "macc": round(self.mean_accuracy(), 4),
            "aacc": round(self.pixel_accuracy(), 4),
            "num_images": self.num_images,
            "num_pixels": int(self.confusion.sum()),
        }


def count_confusion(predicted: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(C, C) pixels, true class by predicted class, of integer tensors of the same shape."""
    counted = labels != ignore_index
    cells = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _percent(part: Tensor, whole: Tensor) -> list[float | None]:
    shares = (100 * part.double() / whole.clamp_min(1)).tolist()
    return [round(share, 4) if n else None for share, n in zip(shares, whole.tolist(), strict=True)]


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / max(len(known), 1)
