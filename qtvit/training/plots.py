"""Pictures of a run and of an evaluation: curves, confusion matrix, calibration, sheets of predictions."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from qtvit.console import shorten

NAME_CHARS = 40
"""Characters of a class name that are drawn."""
MAX_CELLS = 40
"""Classes up to which the counts are written into the confusion matrix."""
NUM_CONFUSIONS = 25
"""Most frequent confusions that are listed beside a larger matrix."""


def plot_curves(metrics_csv: Path, out: Path, panels: Mapping[str, Mapping[str, str]]) -> None:
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
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, name in lines.items():
            epochs, values = series(name)
            if values and (label != "top-5" or min(values) < 100):
                axes.plot(epochs, values, label=label, marker=".")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    save(figure, out)


def draw_confusion(counts: Tensor, classes: Sequence[str], title: str, out: Path, unit: str = "images") -> None:
    """`plot_confusion` of (C, C) counts of images or, in percent of the true class, of pixels."""
    used = ((counts.sum(0) + counts.sum(1)) > 0).nonzero().flatten()
    counts = counts[used][:, used]
    names = [shorten(classes[i], NAME_CHARS) for i in used.tolist()]
    with matplotlib.rc_context({"text.parse_math": False}):  # a class name may hold dollars
        figure = (_small_confusion if len(names) <= MAX_CELLS else _large_confusion)(counts, names, title, unit)
        save(figure, out)


def _small_confusion(counts: Tensor, names: list[str], title: str, unit: str) -> Figure:
    """The matrix with a number in every cell that has one; colour is the share of the true class."""
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    longest = max(map(len, names))
    side = max(0.45 * len(names), 3) + 0.08 * longest
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    percent = "" if unit == "images" else f" (numbers: percent of its {unit})"
    figure.colorbar(image, label=f"share of the true class{percent}", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(names)), names, rotation=90 if longest > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    for row, column in counts.nonzero().tolist():
        shade = "white" if shares[row, column] > 0.5 else "black"
        share = float(100 * shares[row, column])
        text = str(int(counts[row, column])) if unit == "images" else f"{share:.0f}" if share >= 0.5 else ""
        axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=8 if len(names) > 5 else 11)
    return figure


def _large_confusion(counts: Tensor, names: list[str], title: str, unit: str) -> Figure:
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
    bar = figure.colorbar(image, label=f"{unit} predicted wrong", shrink=0.5, aspect=40, format="%d")
    bar.set_ticks(sorted({1, round(most**0.5), most}), minor=False)
    bar.minorticks_off()
    axes.set(xlabel="predicted", ylabel="true", title=f"{title} (blue, the darker the better: right; red: wrong)")
    step = -(-len(names) // 60)
    labels = [shorten(name, 24) for name in names[::step]]
    axes.set_xticks(range(0, len(names), step), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(0, len(names), step), labels, fontsize=7)
    _list_confusions(bars, wrong, counts.sum(1), names, unit)
    return figure


def _list_confusions(axes: Axes, wrong: Tensor, num_true: Tensor, names: list[str], unit: str) -> None:
    """Bars of the pairs of classes that are confused most often, with the number of images and their share."""
    largest = wrong.flatten().topk(NUM_CONFUSIONS)
    pairs = [
        (divmod(i, len(names)), n) for i, n in zip(largest.indices.tolist(), largest.values.tolist(), strict=True) if n
    ]
    axes.set_title(f"The {len(pairs)} most frequent confusions" if pairs else f"No {unit} were predicted wrong")
    axes.axis("off")
    axes.invert_yaxis()
    axes.barh(range(len(pairs)), [n for _, n in pairs], height=0.25, color="indianred")
    for row, ((true, predicted), n) in enumerate(pairs):
        share = 100 * n / int(num_true[true])
        axes.text(0, row - 0.2, f"{names[true]} → {names[predicted]}: {n} ({share:.0f} %)", va="bottom", fontsize=8)


def save(figure: Figure, out: Path) -> None:
    """Write a picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # class names in any script
        figure.savefig(out, dpi=120)
