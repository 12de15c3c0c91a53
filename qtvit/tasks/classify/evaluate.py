"""Scores of a classifier on labelled images."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from qtvit.console import progress
from qtvit.data.split import Sample

from .data import ImageDataset
from .predict import ClassPredictor

NUM_BINS = 15
"""Number of confidence bins of the calibration error; as in Guo et al. 2017."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class in percent; None for a class without images.

    Attributes:
        label: name of the class.
        num_images: number of its images.
        recall: share of its images that are predicted as this class (the accuracy of the class).
        precision: share of the images predicted as this class that belong to it; 0 if there are none.
        f1: harmonic mean of recall and precision.
        taken_for, num_taken: most frequent wrong prediction for its images, if any, and number of these images.
    """

    label: str
    num_images: int
    recall: float | None
    precision: float | None
    f1: float | None
    taken_for: str | None
    num_taken: int


@dataclass(frozen=True)
class ConfidenceBin:
    """The images whose predicted class has a probability above ``low`` and up to ``high``; numbers in percent.

    Attributes:
        low, high: bounds of the probability.
        num_images: number of images in the bin.
        confidence, accuracy: mean probability of the predicted class, and share of the images that are predicted
            right; None in an empty bin.
    """

    low: float
    high: float
    num_images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """The outputs of a classifier for N labelled images, and the scores that follow from them.

    Attributes:
        classes: C names.
        targets: (N,) labels.
        probabilities: (N, C) softmax outputs.
        images_per_second: speed of the forward pass alone.
    """

    classes: Sequence[str]
    targets: Tensor
    probabilities: Tensor
    images_per_second: float

    def accuracy(self, top_k: int = 1) -> float:
        """Percentage of images whose label is among the ``top_k`` most probable classes."""
        num = len(self.classes)
        if top_k >= num:
            return 100.0
        return 100 * float(multiclass_accuracy(self.probabilities, self.targets, num, average="micro", top_k=top_k))

    def confusion(self) -> Tensor:
        """(C, C) numbers of images; rows are true classes, columns predicted ones."""
        return multiclass_confusion_matrix(self.probabilities, self.targets, len(self.classes))

    def per_class(self) -> list[ClassScores]:
        """The scores of every class, in the order of `classes`."""
        counts = self.confusion()
        right, images, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        num_taken, taken_for = (counts - right.diag()).max(1)
        wholes = torch.stack([images, predicted, images + predicted], dim=1).clamp_min(1)
        percents = (100 * torch.stack([right, right, 2 * right], dim=1) / wholes).tolist()
        rows = []
        columns = (images.tolist(), percents, taken_for.tolist(), num_taken.tolist())
        for label, n, scores, other, taken in zip(self.classes, *columns, strict=True):
            recall, precision, f1 = (round(score, 4) if n else None for score in scores)
            rows.append(ClassScores(label, n, recall, precision, f1, self.classes[other] if taken else None, taken))
        return rows

    def balanced_accuracy(self) -> float:
        """Mean recall in percent over the classes that have images."""
        recalls = [row.recall for row in self.per_class() if row.recall is not None]
        return sum(recalls) / len(recalls)

    def calibration(self) -> list[ConfidenceBin]:
        """Accuracy by confidence, in `NUM_BINS` bins of equal width."""
        confidence, predicted = self.probabilities.max(-1)
        confidence = confidence.double()
        bounds = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
        bin_of = torch.bucketize(confidence, bounds[1:-1])
        counts = bin_of.bincount(minlength=NUM_BINS)
        confidences = bin_of.bincount(confidence, NUM_BINS) / counts
        accuracies = bin_of.bincount((predicted == self.targets).double(), NUM_BINS) / counts
        columns = (100 * torch.stack([bounds[:-1], bounds[1:], confidences, accuracies])).tolist()
        low, high, sure, right = ([round(value, 4) for value in column] for column in columns)
        return [
            ConfidenceBin(low[i], high[i], n, sure[i] if n else None, right[i] if n else None)
            for i, n in enumerate(counts.tolist())
        ]

    def calibration_error(self) -> float:
        """Expected calibration error (ECE) in percent: |accuracy - confidence| of each bin, averaged over the images.

        See Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3.
        """
        gaps = (row.num_images * abs((row.accuracy or 0) - (row.confidence or 0)) for row in self.calibration())
        return sum(gaps) / len(self.targets)

    def loss(self) -> float:
        """Cross-entropy: the mean of -log(probability of the true class)."""
        logs = self.probabilities.clamp_min(torch.finfo(self.probabilities.dtype).tiny).log()
        return float(F.nll_loss(logs, self.targets))

    def mistakes(self, num_images: int | None = None) -> list[int]:
        """Indices of the images predicted wrong, the most confident first; at most ``num_images`` of them."""
        confidence, predicted = self.probabilities.max(-1)
        order = confidence.argsort(descending=True, stable=True)
        return order[(predicted != self.targets)[order]][:num_images].tolist()

    def metrics(self) -> dict[str, float]:
        """The overall scores: percentages, except for the loss and the number of images."""
        return {
            "top1": round(self.accuracy(1), 4),
            "top5": round(self.accuracy(5), 4),
            "balanced_accuracy": round(self.balanced_accuracy(), 4),
            "ece": round(self.calibration_error(), 4),
            "loss": round(self.loss(), 6),
            "num_images": len(self.targets),
        }


@torch.inference_mode()
def evaluate(
    predictor: ClassPredictor, samples: Sequence[Sample], *, batch_size: int = 64, num_workers: int = 0
) -> Evaluation:
    """Run ``predictor`` on all ``samples``, with its own preprocessing."""
    dataset = ImageDataset(samples, predictor.preprocess.transform())
    batches: Iterable[tuple[Tensor, Tensor]] = DataLoader(dataset, batch_size, num_workers=num_workers)
    probabilities, targets, seconds = [], [], 0.0
    for images, labels in progress(batches, desc="Evaluating", unit="batch"):
        images = images.to(predictor.device)
        start = time.perf_counter()
        probabilities.append(predictor.runtime(images).softmax(-1).cpu())  # .cpu() waits for the GPU
        seconds += time.perf_counter() - start
        targets.append(labels)
    return Evaluation(predictor.classes, torch.cat(targets), torch.cat(probabilities), len(dataset) / seconds)
