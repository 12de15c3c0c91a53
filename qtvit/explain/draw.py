"""Pictures of attention: rows of weights over the image, and how focused each layer is."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from qtvit.console import shorten
from qtvit.files import replacing

from .entropy import Focus, sharpness
from .points import Point
from .view import Attention

MAX_MAPS = 300
"""Largest number of maps in one picture."""
NAME_CHARS = 32
"""Largest number of characters of a run's name in a legend."""
CHARS_PER_INCH = 13
"""Characters in an inch of text."""
MARGIN, TITLE, BAR, HEADER = 0.12, 0.26, 0.6, 0.62
"""Space in inches: around the picture, above a map for its title, right of it for its colour bar, above a run."""
CELL = 2.3
"""Smallest distance in inches from one map to the next, so that its title fits."""
ALPHA, GREY = 0.6, 0.8
"""Opacity of the colours of a map, and brightness of the image below them."""
Box = tuple[float, float, float, float]
"""(x, y, width, height) in inches from the upper left corner."""


def check_maps(num_points: int, num_heads: Sequence[int], head: int | str) -> None:
    """Check that `draw_attention` can draw ``head`` for ``num_points`` points of runs with ``num_heads`` heads each.

    Raises:
        ValueError: ``head`` is not "mean", "all" or the number of a head, or there are more than `MAX_MAPS` maps.
    """
    is_number = isinstance(head, Integral) and not isinstance(head, bool)
    for count in num_heads:
        if head not in ("mean", "all") and not (is_number and head in range(count)):
            raise ValueError(f"head must be mean, all or a number from 0 to {count - 1}, got {head}")
    num_maps = num_points * (sum(num_heads) if head == "all" else len(num_heads))
    if num_maps > MAX_MAPS:
        raise ValueError(f"{num_maps} maps are too many for one picture; the limit is {MAX_MAPS}")


def draw_attention(
    runs: Mapping[str, Attention], out: Path, head: int | str = "mean", columns: int | None = None
) -> None:
    """Write a PNG of the image with its points, and beside it a map of each point's attention row in every run.

    Several runs stand side by side, with the maps of a point in one row. Weights are drawn as multiples of the uniform
    weight 1 / N, in colours from 0 to the largest weight of the map; they diverge from 0 if there are both signs.

    Args:
        runs: rows of attention by run name, for the same points of the same image.
        head: "mean" over the heads, the number of one, or "all" side by side.
        columns: number of columns of maps, for a single run; default: by the number of maps.

    Raises:
        ValueError: no such head, or more than `MAX_MAPS` maps.
        OSError: the file cannot be written.
    """
    first, *_ = runs.values()
    check_maps(len(first.weights), [run.weights.shape[1] for run in runs.values()], head)
    maps = {name: _pick_heads(run.weights, head) for name, run in runs.items()}
    num_points = len(first.weights)
    num_heads = max(weights.shape[1] for weights in maps.values())
    num_maps = num_points * sum(weights.shape[1] for weights in maps.values())
    columns = min(columns or (1 if num_heads > 1 else _columns(num_points)), num_points) if len(runs) == 1 else 1
    across = _columns(num_heads)  # columns of the heads of one point
    width, height = _fit(first.image.size, 2.4 if num_maps <= 12 else 1.6)
    pitch = max(width + BAR, CELL)
    cell_width, cell_height = across * pitch, -(-num_heads // across) * (height + TITLE)
    source_width, source_height = _fit(first.image.size, 2.4)
    run_width = max(columns * cell_width, 3)
    top, left = MARGIN + HEADER, 3 * MARGIN + max(source_width, 2.4)
    total_height = top + max(-(-num_points // columns) * cell_height, source_height + TITLE) + MARGIN
    canvas = _Canvas(left + len(runs) * run_width, total_height)
    with matplotlib.rc_context({"text.parse_math": False}):  # class names may contain dollar signs
        _draw_image(canvas, first, (MARGIN, top + TITLE, source_width, source_height))
        for number, (name, run) in enumerate(runs.items()):
            x = left + number * run_width
            canvas.text(x, MARGIN, _describe_run(name, run, head), run_width)
            for point, index in itertools.product(range(num_points), range(maps[name].shape[1])):
                (row, column), (down, right) = divmod(point, columns), divmod(index, across)
                map_y = top + TITLE + row * cell_height + down * (height + TITLE)
                box = (x + column * cell_width + right * pitch, map_y, width, height)
                title = f"{point + 1}: " * (num_points > 1) + f"head {index}, " * (num_heads > 1)
                _draw_map(canvas, run, maps[name][point, index], run.marks[point], box, title)
        _save(canvas.figure, out)


def draw_focus(runs: Mapping[str, Sequence[Focus]], out: Path) -> None:
    """Write a PNG of the entropy and the effective support by layer, with a line for each run.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    longest = max(runs.values(), key=len)
    texts = {
        "entropy": ("Entropy of the weights, 1 if all are alike", "entropy / log N"),
        "support": ("Effective support, 1 if all weights are alike", "exp(entropy) / N"),
    }
    with matplotlib.rc_context({"text.parse_math": False}):
        for axes, (attribute, (title, label)) in zip(panels, texts.items(), strict=True):
            for name, rows in runs.items():
                values = [getattr(row, attribute) for row in rows]
                axes.plot(range(len(rows)), values, marker="o", label=f"{shorten(name, NAME_CHARS)} ({rows[0].kernel})")
            axes.set(title=title, ylabel=label, ylim=(0, 1.03))
            same = all([row.layer for row in rows] == [row.layer for row in longest] for rows in runs.values())
            names = [row.layer if same else str(index) for index, row in enumerate(longest)]
            axes.set_xticks(range(len(longest)), names, rotation=45 if same else 0, ha="right" if same else "center")
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(alpha=0.3)
        figure.supxlabel("attention layer (lower: more focused)", fontsize=10)
        panels[0].legend()
        _save(figure, out)


class _Canvas:
    """A figure whose parts are placed in inches from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.width, self.height = width, height

    def axes(self, box: Box) -> Axes:
        """Add axes at ``box``."""
        x, y, width, height = box
        where = x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height
        return self.figure.add_axes(where)

    def text(self, x: float, y: float, lines: Sequence[str], width: float) -> None:
        """Add lines of text with their upper left corner at (x, y), shortened to ``width``."""
        text = "\n".join(shorten(line, int(width * CHARS_PER_INCH)) for line in lines)
        self.figure.text(x / self.width, 1 - y / self.height, text, va="top", fontsize=9, linespacing=1.4)


def _pick_heads(weights: Tensor, head: int | str) -> Tensor:
    """The heads to draw of ``weights`` (points, heads, H, W): (points, 1, H, W), or all as they are."""
    if head == "mean":
        return weights.mean(1, keepdim=True)
    return weights if head == "all" else weights[:, [head]]


def _fit(size: tuple[int, int], side: float) -> tuple[float, float]:
    """Width and height in the proportions of ``size``, with the area of a square of ``side``, or less if very long."""
    ratio = size[0] / size[1]
    width = side * min(ratio**0.5, 2, ratio * 2)
    return width, width / ratio


def _columns(count: int) -> int:
    """Number of columns for ``count`` maps."""
    return min(count, 4 if count <= 12 else 8)


def _describe_run(name: str, run: Attention, head: int | str) -> list[str]:
    num_heads, height, width = run.weights.shape[1:]
    heads = {"mean": f"mean of {num_heads} heads", "all": f"{num_heads} heads"}.get(str(head), f"head {head}")
    sees = f"; sees {run.prediction.label} ({run.prediction.probability:.0%})" if run.prediction else ""
    tokens = f"{width} × {height} tokens of {run.stride} px"
    return [f"{name}: kernel {run.kernel}", f"{run.layer}, {tokens}", f"{heads}{sees}"]


def _draw_image(canvas: _Canvas, run: Attention, box: Box) -> None:
    """Draw the image as the network saw it, with numbers at the points."""
    about = ["query: the circle", "colours: weight × number of", "tokens, 1 if all are alike"]
    canvas.text(box[0], MARGIN, about, max(box[2], 2.4))
    axes = canvas.axes(box)
    axes.imshow(run.image)
    axes.set_title(f"{run.image.width} × {run.image.height} px, as it was shown", fontsize=9, pad=3, loc="left")
    axes.axis("off")
    label = {"boxstyle": "round,pad=0.12", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
    for number, mark in enumerate(run.marks, start=1):
        _draw_mark(axes, mark)
        if len(run.marks) > 1:
            # Numbers are placed away from the upper and lower edge.
            offset, va = ((7, -4), "top") if mark[1] < run.image.height / 2 else ((7, 4), "bottom")
            style: dict[str, Any] = {"textcoords": "offset points", "va": va, "color": "white", "fontsize": 9}
            axes.annotate(str(number), mark, offset, bbox=label, **style)


def _draw_map(canvas: _Canvas, run: Attention, weights: Tensor, mark: Point, box: Box, title: str) -> None:
    """Draw ``weights`` (H, W) in colours over the dimmed image, the query, and a colour bar."""
    x, y, width, height = box
    axes = canvas.axes(box)
    multiples = (weights * weights.numel()).numpy()
    largest = float(np.abs(multiples).max()) or 1
    is_signed = bool(multiples.min() < 0)
    norm = Normalize(-largest if is_signed else 0, largest)
    grey = np.asarray(run.image.convert("L")) * GREY
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    # Token i is centred on pixel stride * i. The last tokens are repeated, as the image may extend beyond them.
    heat = np.pad(multiples, (0, 1), mode="edge")
    left, right, bottom = (run.stride * (count - 0.5) for count in (0, *heat.shape[::-1]))
    colors = "RdBu_r" if is_signed else "inferno"
    axes.imshow(heat, colors, norm, alpha=ALPHA, extent=(left, right, bottom, left), interpolation="bilinear")
    axes.set(xlim=(-0.5, run.image.width - 0.5), ylim=(run.image.height - 0.5, -0.5))
    axes.axis("off")
    support = float(sharpness(weights.flatten())[1])
    about = "no weights" if math.isnan(support) else f"support {support:.0%}{' of |w|' * is_signed}"
    axes.set_title(f"{title}{about}", fontsize=9, pad=3, loc="left")
    _draw_mark(axes, mark)
    bar_axes = canvas.axes((x + width + 0.06, y, 0.08, height))
    bar = canvas.figure.colorbar(ScalarMappable(norm, colors), cax=bar_axes, alpha=ALPHA)
    bar_axes.set_facecolor(str(grey.mean() / 255))  # the bar shows the colours over mean brightness of the image
    bar.ax.tick_params(labelsize=7, length=2, pad=2)
    bar.outline.set_visible(False)


def _draw_mark(axes: Axes, mark: Point) -> None:
    """Draw a circle at ``mark``, white on black so that it shows on any background."""
    for color, width in (("black", 3.2), ("white", 1.5)):
        axes.plot(*mark, "o", ms=8, mfc="none", mec=color, mew=width, clip_on=False)


def _save(figure: Figure, out: Path) -> None:
    with warnings.catch_warnings(), replacing(out) as temporary:
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script
        figure.savefig(temporary, format="png", dpi=120)
