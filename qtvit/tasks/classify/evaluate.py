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
"""Of confidence, for the calibration error; Guo et al. 2017 use as many."""


@dataclass(frozen=True)
class ClassScores:
    """One class in a table; scores in percent, None for a class without images.

    Attributes:
        label: name of the class.
        num_images: that are of this class.
        recall: the part of these that is predicted as this class (the accuracy of the class).
        precision: the part of what is predicted as this class that is of it; 0 if nothing is.
        f1: harmonic mean of the two.
        taken_for: the most frequent wrong prediction of the images, if there is one.
        num_taken: how many images got it.
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
    """The images whose predicted class has a probability above ``low`` and up to ``high``; all in percent.

    Attributes:
        low, high: bounds of the probability.
        num_images: in the bin.
        confidence: mean probability of the predicted class; None in an empty bin.
        accuracy: the part of the images that is predicted right; None in an empty bin.
    """

    low: float
    high: float
    num_images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a classifier said of N labelled images.

    Attributes:
        classes: C names.
        targets: (N,) labels.
        probabilities: (N, C) softmax outputs.
        images_per_second: speed of the forward pass alone, in the batches evaluated.
    """

    classes: Sequence[str]
    targets: Tensor
    probabilities: Tensor
    images_per_second: float

    def accuracy(self, top_k: int = 1) -> float:
        """Percentage of images whose label is among the ``top_k`` most probable classes."""
        num_classes = len(self.classes)
        if top_k >= num_classes:
            return 100.0
        correct = multiclass_accuracy(self.probabilities, self.targets, num_classes, average="micro", top_k=top_k)
        return 100 * float(correct)

    def confusion(self) -> Tensor:
        """(C, C) counts, true class by predicted class."""
        return multiclass_confusion_matrix(self.probabilities, self.targets, len(self.classes))

    def per_class(self) -> list[ClassScores]:
        """The scores of every class, in the order of `classes`."""
        counts = self.confusion()
        right, images, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        num_taken, taken_for = (counts - right.diag()).max(1)

        def percent(part: Tensor, whole: Tensor) -> list[float | None]:
            shares = (100 * part / whole.clamp_min(1)).tolist()
            return [round(share, 4) if n else None for share, n in zip(shares, images.tolist(), strict=True)]

        columns = zip(
            self.classes,
            images.tolist(),
            percent(right, images),
            percent(right, predicted),
            percent(2 * right, images + predicted),
            [self.classes[i] if n else None for i, n in zip(taken_for.tolist(), num_taken.tolist(), strict=True)],
            num_taken.tolist(),
            strict=True,
        )
        return [ClassScores(*row) for row in columns]

    def balanced_accuracy(self) -> float:
        """Mean recall in percent over the classes that have images."""
        recalls = [row.recall for row in self.per_class() if row.recall is not None]
        return sum(recalls) / len(recalls)

    def calibration(self) -> list[ConfidenceBin]:
        """How often the classifier is right, by how sure it is, in `NUM_BINS` bins of equal width."""
        confidence, predicted = self.probabilities.max(-1)
        confidence = confidence.double()
        bounds = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
        bin_of = torch.bucketize(confidence, bounds[1:-1])
        counts = bin_of.bincount(minlength=NUM_BINS)
        confidences = bin_of.bincount(confidence, NUM_BINS) / counts
        accuracies = bin_of.bincount((predicted == self.targets).double(), NUM_BINS) / counts
        return [
            ConfidenceBin(
                low=round(100 * float(bounds[i]), 4),
                high=round(100 * float(bounds[i + 1]), 4),
                num_images=count,
                confidence=round(100 * float(confidences[i]), 4) if count else None,
                accuracy=round(100 * float(accuracies[i]), 4) if count else None,
            )
            for i, count in enumerate(counts.tolist())
        ]

    def calibration_error(self) -> float:
        """The expected calibration error (ECE) in percent: |accuracy - confidence| of the bins of `calibration`,
        averaged by their images (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3).
        """
        gaps = (
            row.num_images * abs(row.accuracy - row.confidence)
            for row in self.calibration()
            if row.accuracy is not None and row.confidence is not None
        )
        return sum(gaps) / len(self.targets)

    def loss(self) -> float:
        """Cross-entropy: the mean of -log(probability of the true class)."""
        logs = self.probabilities.clamp_min(torch.finfo(self.probabilities.dtype).tiny).log()
        return float(F.nll_loss(logs, self.targets))

    def mistakes(self, num_images: int | None = None) -> list[int]:
        """Positions of the images predicted wrong, the most confident first; at most ``num_images``."""
        confidence, predicted = self.probabilities.max(-1)
        order = confidence.argsort(descending=True, stable=True)
        return order[(predicted != self.targets)[order]][:num_images].tolist()

    def metrics(self) -> dict[str, float]:
        """The scores in one number each: percentages, but for the loss and the number of images."""
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
    predictor: ClassPredictor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Evaluation:
    """Run ``predictor`` over all ``samples``, with its own preprocessing."""
    dataset = ImageDataset(samples, predictor.preprocess.transform())
    batches: Iterable[tuple[Tensor, Tensor]] = DataLoader(dataset, batch_size, num_workers=num_workers)
    probabilities, targets, seconds = [], [], 0.0
    for images, labels in progress(batches, desc="Evaluating", unit="batch"):
        images = images.to(predictor.device)
        start = time.perf_counter()
        logits = predictor.runtime(images)
        probabilities.append(logits.softmax(-1).cpu())
        seconds += time.perf_counter() - start
        targets.append(labels)
    return Evaluation(predictor.classes, torch.cat(targets), torch.cat(probabilities), len(dataset) / seconds)
