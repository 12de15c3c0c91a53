"""Pictures of a run: training curves, confusion matrix, a sheet of predictions."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from qtvit.data import open_image
from qtvit.data.classification import Sample

from .evaluate import Evaluation


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Loss, accuracy and learning rate over the epochs, from the log of the run."""
    with metrics_csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(float(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {
        "Loss": {"training": "train/loss", "held out": "val/loss"},
        "Accuracy (%)": {"top-1": "val/top1", "top-5": "val/top5"},
        "Learning rate": {"": "lr"},
    }
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, name in lines.items():
            epochs, values = series(name)
            if label != "top-5" or min(values) < 100:
                axes.plot(epochs, values, label=label, marker=".")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    figure.savefig(out, dpi=120)


def plot_confusion(evaluation: Evaluation, out: Path) -> None:
    """Share of each true class that was predicted as each class; counts are written in where they can be read."""
    counts = evaluation.confusion()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    num_classes = len(evaluation.classes)
    side = min(max(4.5, 0.45 * num_classes + 2), 20)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"top-1 {evaluation.accuracy():.2f} % of {len(evaluation.targets)} images",
    )
    if num_classes <= 40:
        axes.set_xticks(
            range(num_classes), evaluation.classes, rotation=90 if max(map(len, evaluation.classes)) > 3 else 0
        )
        axes.set_yticks(range(num_classes), evaluation.classes)
        for row, column in counts.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=shade, fontsize=8)
    figure.savefig(out, dpi=120)


def plot_predictions(evaluation: Evaluation, samples: Sequence[Sample], out: Path, num_images: int = 24) -> None:
    """A sheet of images with what was predicted: mistakes first, the most confident leading, then a spread of the
    others.
    """
    confidence, predicted = evaluation.probabilities.max(-1)
    right = predicted == evaluation.targets
    order = torch.argsort(right.float() * 2 - confidence)
    mistakes = order[: int((~right).sum())][: num_images // 2]
    others = order[int((~right).sum()) :]
    spread = others[torch.linspace(0, len(others) - 1, min(num_images - len(mistakes), len(others))).long()]
    chosen = torch.cat([mistakes, spread]).tolist()
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows), layout="constrained")
    figure.suptitle("Predictions on held-out images (red: wrong, with the true class in brackets)", fontsize=10)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, index in zip(figure.axes, chosen, strict=False):
        axes.imshow(open_image(samples[index][0]))
        title = f"{evaluation.classes[int(predicted[index])]} {float(confidence[index]):.0%}"
        if not right[index]:
            title += f"\n[{evaluation.classes[int(evaluation.targets[index])]}]"
        axes.set_title(title, fontsize=8, color="black" if right[index] else "crimson")
    figure.savefig(out, dpi=120)
