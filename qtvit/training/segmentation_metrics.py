"""Scores of a segmentation network, from the pixels of each class that were taken for each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix


@dataclass(frozen=True)
class RegionScores:
    """One class in a table; scores in percent.

    Attributes:
        label: name of the class.
        num_pixels: that are of this class.
        iou: intersection over union; None for a class that is neither in the masks nor predicted.
        accuracy: the part of the pixels that is predicted as this class; None for a class without pixels.
        precision: the part of what is predicted as this class that is of it; None if nothing is.
        taken_for: the most frequent wrong prediction of its pixels, if there is one.
        num_taken: how many pixels got it.
    """

    label: str
    num_pixels: int
    iou: float | None
    accuracy: float | None
    precision: float | None
    taken_for: str | None
    num_taken: int


@dataclass(frozen=True)
class SegmentationScores:
    """What a network said of all pixels that are of a class.

    Means are over the classes that have a score: a class that no mask has and that is never predicted has no IoU; one
    that no mask has but that is predicted has the IoU 0, and no accuracy.

    Attributes:
        classes: C names.
        confusion: (C, C) pixels, true class by predicted class.
        num_images: that were scored.
    """

    classes: Sequence[str]
    confusion: Tensor
    num_images: int

    def per_class(self) -> list[RegionScores]:
        """The scores of every class, in the order of `classes`."""
        counts = self.confusion
        right, pixels, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        num_taken, taken_for = (counts - right.diag()).max(1)
        columns = zip(
            self.classes,
            pixels.tolist(),
            _percent(right, pixels + predicted - right),
            _percent(right, pixels),
            _percent(right, predicted),
            [self.classes[i] if n else None for i, n in zip(taken_for.tolist(), num_taken.tolist(), strict=True)],
            num_taken.tolist(),
            strict=True,
        )
        return [RegionScores(*row) for row in columns]

    def mean_iou(self) -> float:
        """mIoU in percent; 0 if nothing was scored."""
        return _mean([row.iou for row in self.per_class()])

    def mean_accuracy(self) -> float:
        """mAcc in percent: the mean accuracy of the classes."""
        return _mean([row.accuracy for row in self.per_class()])

    def pixel_accuracy(self) -> float:
        """aAcc: the percentage of all pixels that is predicted right."""
        return _percent(self.confusion.diagonal().sum()[None], self.confusion.sum()[None])[0] or 0.0

    def metrics(self) -> dict[str, float]:
        """The scores in one number each: percentages, but for the numbers of images and pixels."""
        return {
            "miou": round(self.mean_iou(), 4),
            "macc": round(self.mean_accuracy(), 4),
            "aacc": round(self.pixel_accuracy(), 4),
            "num_images": self.num_images,
            "num_pixels": int(self.confusion.sum()),
        }


class SegmentationConfusion(Metric):
    """Counts pixels, true class by predicted class, over images of any size; several processes add theirs up.

    It takes predicted classes, not logits: these have to be resized to the mask's own size first, see
    `qtvit.deploy.sliding.resized_labels`.

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
        self.confusion += multiclass_confusion_matrix(
            predicted.long(), labels.long(), self.num_classes, ignore_index=self.ignore_index, validate_args=False
        )
        self.num_images += len(labels) if labels.ndim == 3 else 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """The counts and the number of images, of all processes."""
        return self.confusion, self.num_images

    def scores(self, classes: Sequence[str]) -> SegmentationScores:
        """The scores of all images of all processes."""
        confusion, num_images = self.compute()
        return SegmentationScores(classes, confusion.cpu(), int(num_images))


def _percent(part: Tensor, whole: Tensor) -> list[float | None]:
    shares = (100 * part.double() / whole.clamp_min(1)).tolist()
    return [round(share, 4) if n else None for share, n in zip(shares, whole.tolist(), strict=True)]


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / max(len(known), 1)
