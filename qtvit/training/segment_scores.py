"""Scores of a segmenter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassIoU:
    """One class in a table; scores in percent.

    Attributes:
        label: name of the class.
        num_pixels: that are of this class.
        iou: intersection over union of its pixels and those predicted to be of it; None if there are neither.
        recall: the part of its pixels that is predicted right (the accuracy of the class); None if it has none.
        precision: the part of what is predicted as this class that is of it; None if nothing is.
    """

    label: str
    num_pixels: int
    iou: float | None
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class SegmentScores:
    """What the pixels of all images were predicted as.

    Attributes:
        classes: names.
        confusion: (C, C) counts of pixels, true class by predicted class; ignored pixels are not among them.
        num_images: that they are of.
    """

    classes: Sequence[str]
    confusion: Tensor
    num_images: int

    def per_class(self) -> list[ClassIoU]:
        """The scores of every class, in the order of `classes`."""
        counts = self.confusion.double()
        right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        columns = [
            [round(100 * float(part), 4) if whole else None for part, whole in zip(right / wholes, wholes, strict=True)]
            for wholes in (true + predicted - right, true, predicted)
        ]
        return [ClassIoU(*row) for row in zip(self.classes, true.long().tolist(), *columns, strict=True)]

    def miou(self) -> float:
        """Mean IoU in percent of the classes that are there or predicted."""
        return mean_iou(self.confusion)

    def mean_accuracy(self) -> float:
        """Mean recall in percent of the classes that have pixels."""
        counts = self.confusion.double()
        return _mean(counts.diagonal(), counts.sum(1))

    def accuracy(self) -> float:
        """The part of all pixels that is predicted right, in percent."""
        counts = self.confusion.double()
        return _mean(counts.diagonal().sum().reshape(1), counts.sum().reshape(1))

    def metrics(self) -> dict[str, float]:
        """The scores in one number each."""
        return {
            "miou": round(self.miou(), 4),
            "macc": round(self.mean_accuracy(), 4),
            "aacc": round(self.accuracy(), 4),
            "num_images": self.num_images,
        }


def mean_iou(confusion: Tensor) -> float:
    """Mean IoU in percent, from (C, C) counts, of the classes that are there or predicted; 0 if there are no pixels."""
    counts = confusion.double()
    right = counts.diagonal()
    return _mean(right, counts.sum(0) + counts.sum(1) - right)


def _mean(parts: Tensor, wholes: Tensor) -> float:
    """The mean in percent of parts / wholes, of the wholes that are not empty."""
    shares = (parts / wholes)[wholes > 0]
    return 100 * float(shares.mean()) if len(shares) else 0.0

