"""Pictures of a run and of an evaluation: curves, confusion matrix, calibration, sheets of predictions."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from qtvit.data import open_image
from qtvit.data.classification import Sample
from qtvit.data.images import source_name
from qtvit.deploy.annotate import Tile, contact_sheet, shorten, thumbnail

from .evaluate import Evaluation

NAME_CHARS = 40
"""Characters of a class name that are drawn."""
MAX_CELLS = 40
"""Classes up to which the counts are written into the confusion matrix."""
NUM_CONFUSIONS = 25
"""Most frequent confusions that are listed beside a larger matrix."""


CLASSIFY_CURVES = {
    "Loss": {"training": "train/loss", "held out": "val/loss"},
    "Accuracy (%)": {"top-1": "val/top1", "top-5": "val/top5"},
    "Learning rate": {"": "lr"},
}


def plot_curves(metrics_csv: Path, out: Path, panels: Mapping[str, Mapping[str, str]] = CLASSIFY_CURVES) -> None:
    """Loss, scores and learning rate over the epochs, from the log of the run.

    Args:
        metrics_csv: the log.
        out: picture to write.
        panels: by title; each has metrics by label, of which those are drawn that are in the log.
    """
    with metrics_csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(float(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, name in lines.items():
            epochs, values = series(name)
            if values and (label != "top-5" or min(values) < 100):
                axes.plot(epochs, values, label=label, marker=".")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    save(figure, out)


def plot_confusion(evaluation: Evaluation, out: Path) -> None:
    """True by predicted classes: counts where they can be read, else colours and a list of what is confused most.

    Classes that are neither the label nor the prediction of any image are left out.
    """
    counts = evaluation.confusion()
    used = ((counts.sum(0) + counts.sum(1)) > 0).nonzero().flatten()
    counts = counts[used][:, used]
    names = [shorten(evaluation.classes[i], NAME_CHARS) for i in used.tolist()]
    title = f"top-1 {evaluation.accuracy():.2f} % of {len(evaluation.targets)} images"
    with matplotlib.rc_context({"text.parse_math": False}):  # a class name may hold dollars
        figure = (_small_confusion if len(names) <= MAX_CELLS else _large_confusion)(counts, names, title)
        save(figure, out)


def _small_confusion(counts: Tensor, names: list[str], title: str) -> Figure:
    """The matrix with a number in every cell that has one; colour is the share of the true class."""
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    longest = max(map(len, names))
    side = max(0.45 * len(names), 3) + 0.08 * longest
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(names)), names, rotation=90 if longest > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    for row, column in counts.nonzero().tolist():
        shade = "white" if shares[row, column] > 0.5 else "black"
        text = str(int(counts[row, column]))
        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=8 if len(names) > 5 else 11)
    return figure


def _large_confusion(counts: Tensor, names: list[str], title: str) -> Figure:
    """The matrix in colours, beside a list of the most frequent confusions.

    The cells of very many classes are smaller than a pixel; each is then drawn as large as it takes to be seen.
    """
    figure = Figure(figsize=(18, 11), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(2.4, 1))
    right = counts.diagonal()
    wrong = counts - right.diag()
    recall = (100 * right / counts.sum(1).clamp_min(1)).diag()
    most = max(int(wrong.max()), 2)
    grown = 2 * (len(names) // 600) + 1  # classes across a cell; the matrix has about 1000 pixels
    reds = LinearSegmentedColormap.from_list("reds", matplotlib.colormaps["Reds"](np.linspace(0.35, 1, 64)))
    for values, colors, norm in ((recall, "Blues", Normalize(0, 100)), (wrong, reds, LogNorm(1, most))):
        cells = F.max_pool2d(values[None].float(), grown, stride=1, padding=grown // 2)[0].numpy()
        image = axes.imshow(np.ma.masked_equal(cells, 0), colors, norm, interpolation="nearest")
    bar = figure.colorbar(image, label="images predicted wrong", shrink=0.5, aspect=40, format="%d")
    bar.set_ticks(sorted({1, round(most**0.5), most}), minor=False)
    bar.minorticks_off()
    axes.set(xlabel="predicted", ylabel="true", title=f"{title} (blue, the darker the better: right; red: wrong)")
    step = -(-len(names) // 60)
    labels = [shorten(name, 24) for name in names[::step]]
    axes.set_xticks(range(0, len(names), step), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(0, len(names), step), labels, fontsize=7)
    _list_confusions(bars, wrong, counts.sum(1), names)
    return figure


def _list_confusions(axes: Axes, wrong: Tensor, num_images: Tensor, names: list[str]) -> None:
    """Bars of the pairs of classes that are confused most often, with the number of images and their share."""
    largest = wrong.flatten().topk(NUM_CONFUSIONS)
    pairs = [
        (divmod(i, len(names)), n) for i, n in zip(largest.indices.tolist(), largest.values.tolist(), strict=True) if n
    ]
    axes.set_title(f"The {len(pairs)} most frequent confusions" if pairs else "No image was predicted wrong")
    axes.axis("off")
    axes.invert_yaxis()
    axes.barh(range(len(pairs)), [n for _, n in pairs], height=0.25, color="indianred")
    for row, ((true, predicted), n) in enumerate(pairs):
        share = 100 * n / int(num_images[true])
        axes.text(0, row - 0.2, f"{names[true]} → {names[predicted]}: {n} ({share:.0f} %)", va="bottom", fontsize=8)


def plot_calibration(evaluation: Evaluation, out: Path) -> None:
    """Accuracy by confidence (they should agree: the dashed line), and how many images have which confidence."""
    rows = evaluation.calibration()
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    full = [
        (row, row.accuracy, row.confidence) for row in rows if row.accuracy is not None and row.confidence is not None
    ]
    middles = [(row.low + row.high) / 2 for row, _, _ in full]
    width = 0.92 * (rows[0].high - rows[0].low)
    top.bar(middles, [accuracy for _, accuracy, _ in full], width, color="steelblue", label="accuracy")
    gaps = [confidence - accuracy for _, accuracy, confidence in full]
    bases = [accuracy for _, accuracy, _ in full]
    top.bar(middles, gaps, width, bases, color="none", edgecolor="crimson", hatch="///", label="gap to confidence")
    top.plot([0, 100], [0, 100], "--", color="grey")
    top.set(
        title=f"Calibration error (ECE) {evaluation.calibration_error():.2f} %",
        ylabel="accuracy (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    top.legend(loc="upper left")
    bottom.bar(middles, [100 * row.num_images / len(evaluation.targets) for row, _, _ in full], width, color="grey")
    bottom.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    save(figure, out)


def plot_mistakes(evaluation: Evaluation, samples: Sequence[Sample], out: Path, num_images: int = 24) -> None:
    """A sheet of the images predicted wrong, the most confident first; of the least certain right ones if none is."""
    chosen = evaluation.mistakes(num_images)
    if chosen:
        title = f"The most confident of {len(evaluation.mistakes())} mistakes in {len(evaluation.targets)} images"
    else:
        chosen = evaluation.probabilities.max(-1).values.argsort(stable=True)[:num_images].tolist()
        title = f"No mistakes in {len(evaluation.targets)} images; these are the least certain"
    _save_sheet(evaluation, samples, chosen, title, out)


def plot_predictions(evaluation: Evaluation, samples: Sequence[Sample], out: Path, num_images: int = 24) -> None:
    """A sheet of images from all over the samples, with what was predicted."""
    chosen = torch.linspace(0, len(samples) - 1, min(num_images, len(samples))).round().int().tolist()
    _save_sheet(evaluation, samples, chosen, f"{len(chosen)} of {len(samples)} images (red: predicted wrong)", out)


def _save_sheet(
    evaluation: Evaluation, samples: Sequence[Sample], chosen: Sequence[int], title: str, out: Path
) -> None:
    """Pictures of the ``chosen`` samples, with predicted class and confidence, the true class if it is another, and
    the name of the file if it has one.
    """
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


def save(figure: Figure, out: Path) -> None:
    """Write a picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # class names in any script
        figure.savefig(out, dpi=120)
