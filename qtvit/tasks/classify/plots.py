"""Pictures of the evaluation of a classifier: confusion matrix, calibration, sheets of predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from qtvit.data import open_image
from qtvit.data.images import source_name
from qtvit.data.split import Sample
from qtvit.deploy.annotate import Tile, contact_sheet, thumbnail
from qtvit.training.plots import draw_confusion, save

from .evaluate import Evaluation


def plot_confusion(evaluation: Evaluation, out: Path) -> None:
    """Draw the confusion matrix: with counts if they are legible, else in colours beside the most frequent confusions.

    Classes that are neither the label nor the prediction of any image are left out.
    """
    title = f"top-1 {evaluation.accuracy():.2f} % of {len(evaluation.targets)} images"
    draw_confusion(evaluation.confusion(), evaluation.classes, title, out)


def plot_calibration(evaluation: Evaluation, out: Path) -> None:
    """Draw accuracy by confidence (the dashed line is where they agree), and the distribution of the confidence."""
    rows = evaluation.calibration()
    width = 0.92 * (rows[0].high - rows[0].low)
    full = [row for row in rows if row.num_images]
    middles = [(row.low + row.high) / 2 for row in full]
    accuracy, confidence = np.array([(row.accuracy, row.confidence) for row in full], float).T
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(middles, accuracy, width, color="steelblue", label="accuracy")
    gap = {"color": "none", "edgecolor": "crimson", "hatch": "///", "label": "gap to confidence"}
    top.bar(middles, confidence - accuracy, width, accuracy, **gap)
    top.plot([0, 100], [0, 100], "--", color="grey")
    title = f"Calibration error (ECE) {evaluation.calibration_error():.2f} %"
    top.set(title=title, ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    top.legend(loc="upper left")
    bottom.bar(middles, [100 * row.num_images / len(evaluation.targets) for row in full], width, color="grey")
    bottom.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    save(figure, out)


def plot_mistakes(evaluation: Evaluation, samples: Sequence[Sample], out: Path, num_images: int = 24) -> None:
    """Draw a sheet of the most confident mistakes, or, without mistakes, of the images with the least confidence."""
    chosen = evaluation.mistakes(num_images)
    if chosen:
        title = f"The most confident of {len(evaluation.mistakes())} mistakes in {len(evaluation.targets)} images"
    else:
        chosen = evaluation.probabilities.max(-1).values.argsort(stable=True)[:num_images].tolist()
        title = f"No mistakes in {len(evaluation.targets)} images; these are the least certain"
    _save_sheet(evaluation, samples, chosen, title, out)


def plot_predictions(evaluation: Evaluation, samples: Sequence[Sample], out: Path, num_images: int = 24) -> None:
    """Draw a sheet of evenly spaced samples with their predictions."""
    chosen = torch.linspace(0, len(samples) - 1, min(num_images, len(samples))).round().int().tolist()
    _save_sheet(evaluation, samples, chosen, f"{len(chosen)} of {len(samples)} images (red: predicted wrong)", out)


def _save_sheet(evaluation: Evaluation, samples: Sequence[Sample], chosen: list[int], title: str, out: Path) -> None:
    """Draw the ``chosen`` samples with confidence, predicted class, true class if it differs, and file name if any."""
    confidence, predicted = evaluation.probabilities.max(-1)
    tiles = []
    for index in chosen:
        source, label = samples[index]
        wrong = int(predicted[index]) != label
        lines = [f"{float(confidence[index]):.0%} {evaluation.classes[int(predicted[index])]}"]
        lines += [f"is {evaluation.classes[label]}"] if wrong else []
        lines += [name] if (name := source_name(source)) else []
        tiles.append(Tile(thumbnail(open_image(source)), lines, "crimson" if wrong else "black"))
    contact_sheet(tiles, title).save(out)
