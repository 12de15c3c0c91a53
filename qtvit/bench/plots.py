"""Pictures of the benchmarks' results."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from qtvit.files import replacing

from .pareto import OURS
from .tables import Result, ratio_text, size_text

OURS_COLOR, PEER_COLOR = "tab:red", "grey"
FAMILY_COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive"]
FAMILY_COLORS += ["tab:cyan", "navy", "black", "darkgoldenrod", "teal", "limegreen", "indigo"]
"""Colours of other model families; reds are reserved for ours."""
MARKERS = "os^Dvp"
RADII = range(6, 80, 6)
"""Gaps between a point and its label to try, in points of 1/72 inch. A label gets a line to its point beyond `NEAR`."""
NEAR = 12
DIRECTIONS = np.array([(1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0)])
"""Directions from a point to its label to try at each gap, as signs of x and y."""
MARKER = 5
"""Half the side of the square around each point that labels keep free, in pixels."""


def plot_latency(result: Result, out: Path) -> None:
    """Draw median times with quartiles as bars: one panel per image and batch size, one colour per model."""
    peer = result["settings"]["peer"]
    others = [name for name in dict.fromkeys(row["model"] for row in result["rows"]) if name != peer]
    colors = {peer: PEER_COLOR, **dict(zip(others, itertools.cycle((OURS_COLOR, *FAMILY_COLORS)), strict=False))}
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in result["rows"]:
        groups.setdefault((size_text(row["img_size"]), row["batch_size"]), []).append(row)
    longest = max(map(len, groups.values()))
    figure = Figure(figsize=(7.5 * len(groups), 1.5 + 0.32 * longest), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, ((size, batch), rows) in zip(panels, groups.items(), strict=True):
        rows = sorted(rows, key=lambda row: (row["runtime"], row["precision"], row["median_seconds"]))
        _bars(
            axes,
            {f"{row['model']}, {row['runtime']} {row['precision']}": row["seconds"] for row in rows},
            [f"{1e3 * row['median_seconds']:.2f}{_peer_note(row['ratio'])}" for row in rows],
            [colors[row["model"]] for row in rows],
            scale=1e3,
        )
        axes.set(title=f"{size} px, batch {batch}", xlabel=f"ms (time / {peer})")
    _save(figure, result, out)


def plot_train(result: Result, out: Path) -> None:
    """Draw the bytes kept for the backward pass, and the time of a training step, of each model."""
    models, peer = result["models"], result["settings"]["peer"]
    colors = [PEER_COLOR if name == peer else OURS_COLOR for name in models]
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(models)), layout="constrained")
    kept, step = figure.subplots(1, 2)
    values = {name: [row["bytes_kept_per_image"]] for name, row in models.items()}
    notes = [f"{row['bytes_kept_per_image'] / 1e6:.1f} ({row['bytes_kept_ratio']:.2f})" for row in models.values()]
    _bars(kept, values, notes, colors, scale=1e-6)
    kept.set(title="Kept for the backward pass", xlabel=f"MB per image (ratio to {peer})")
    seconds = {name: row["step_seconds"] for name, row in models.items()}
    notes = [f"{1e3 * r['step_median_seconds']:.1f}, ratio {ratio_text(r['step_ratio'])}" for r in models.values()]
    _bars(step, seconds, notes, colors, scale=1e3)
    step.set(title="Training step", xlabel=f"ms (ratio to {peer})")
    _save(figure, result, out)


def plot_loader(result: Result, out: Path) -> None:
    """Draw the images per second of each loader."""
    loaders, settings = result["loaders"], result["settings"]
    images = settings["batches"] * settings["batch_size"]
    rates = {name: [images / seconds for seconds in row["seconds"]] for name, row in loaders.items()}
    notes = [f"{row['images_per_second']:.1f}, ratio {ratio_text(row['ratio'])}" for row in loaders.values()]
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(loaders)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, rates, notes, [PEER_COLOR if name == "timm" else OURS_COLOR for name in loaders], scale=1)
    axes.set(title="Training images", xlabel="images per second (ratio to timm)")
    _save(figure, result, out)


def plot_scaling(result: Result, out: Path) -> None:
    """Draw time against size on logarithmic axes: one panel for each kind of attention, and one for whole networks."""
    parts = list(dict.fromkeys(curve["part"] for curve in result["curves"]))
    figure = Figure(figsize=(6 * len(parts), 4.8), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        curves = [curve for curve in result["curves"] if curve["part"] == part and curve["sizes"]]
        for curve, marker in zip(curves, MARKERS * len(curves), strict=False):
            times = 1e3 * np.array(curve["median_seconds"])
            low, high = (1e3 * np.array([np.quantile(s, q) for s in curve["seconds"]]) for q in (0.25, 0.75))
            power = "" if curve["exponent"] is None else f"  ~ {curve['unit']}$^{{{curve['exponent']:.2f}}}$"
            (line,) = axes.plot(curve["sizes"], times, marker=marker, markersize=4, label=curve["name"] + power)
            axes.fill_between(curve["sizes"], low, high, color=line.get_color(), alpha=0.2)
        for cross in result["crossovers"]:
            if cross["part"] == part and cross["wins"] == "from":
                label = f"faster than {cross['than']} from {cross['at']:,.0f}"
                axes.axvline(cross["at"], color="grey", linestyle=":", linewidth=1, label=label)
        axes.set(xscale="log", yscale="log", title=part, xlabel=curves[0]["unit"] if curves else "", ylabel="ms")
        _plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=8)
    _save(figure, result, out)


def plot_pareto(result: Result, out: Path) -> None:
    """Draw published top-1 against measured latency, with a label for each model and a line along the Pareto front."""
    rows, settings = result["rows"], result["settings"]
    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.subplots()
    others = [family for family in dict.fromkeys(row["family"] for row in rows) if family != OURS]
    colors = {OURS: OURS_COLOR, **dict(zip(others, itertools.cycle(FAMILY_COLORS), strict=False))}
    for number, (family, color) in enumerate(colors.items()):
        mine = [row for row in rows if row["family"] == family]
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "s": 28}
        if family == OURS:
            style = {"marker": "*", "s": 150, "zorder": 4}
        if mine:
            x, y = [1e3 * row["latency_seconds"] for row in mine], [row["published_top1"] for row in mine]
            axes.scatter(x, y, color=color, label=family, edgecolors="white", **style)
    points = [(1e3 * row["latency_seconds"], row["published_top1"]) for row in rows]
    front = [point for point, row in zip(points, rows, strict=True) if row["on_front"]]
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, zorder=1, drawstyle="steps-post", label="front")
    axes.set(
        xscale="log",
        title=f"ImageNet-1k top-1 as published, latency as measured: {settings['runtime']} {settings['precision']}, "
        f"batch {settings['batch_size']}, {_threads(result['environment'])}",
        xlabel="ms per batch",
        ylabel="published top-1 (%)",
    )
    _plain_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    place_labels(
        axes,
        points,
        [row["label"] for row in rows],
        [colors[row["family"]] for row in rows],
        [row["family"] == OURS or row["on_front"] for row in rows],
    )
    _save(figure, result, out)


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colors: Sequence[str],
    important: Sequence[bool],
) -> None:
    """Write each name near its point, ``important`` ones in bold and first, so that they get the nearest places.

    Names do not cover points, lines, the legend or each other; one that finds no free place is left out. The limits of
    ``axes`` have to be final.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # settles the layout, so that positions in pixels are final
    pixels = axes.transData.transform(points)
    taken = [Bbox([pixel - MARKER, pixel + MARKER]) for pixel in pixels]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for i in sorted(range(len(points)), key=lambda i: not important[i]):
        line = {"arrowstyle": "-", "color": colors[i], "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        style: dict[str, Any] = {"color": colors[i], "weight": "bold" if important[i] else "normal", "fontsize": 7}
        text = axes.annotate(names[i], points[i], (0, 0), textcoords="offset points", arrowprops=line, **style)
        text.set(ha="center", va="center", path_effects=[withStroke(linewidth=2, foreground="white")])
        size = np.array(Text.get_window_extent(text).size)  # Annotation's own method counts the line in
        for radius, direction in itertools.product(RADII, DIRECTIONS):
            offset = direction * (radius * figure.dpi / 72 + size / 2)
            box = Bbox([pixels[i] + offset - size / 2, pixels[i] + offset + size / 2])
            is_inside = np.all(box.min >= axes.bbox.min) and np.all(box.max <= axes.bbox.max)
            on_line = any(path.intersects_bbox(box.padded(2), filled=False) for path in paths)
            if is_inside and not on_line and not box.count_overlaps(taken):
                text.set_position(tuple(offset * 72 / figure.dpi))
                if radius <= NEAR and text.arrow_patch is not None:
                    text.arrow_patch.set_visible(False)
                taken.append(box)
                break
        else:
            text.remove()


def _bars(
    axes: Axes, values: Mapping[str, Sequence[float]], notes: Sequence[str], colors: Sequence[str], scale: float
) -> None:
    """Draw each median as a horizontal bar with a line from quartile to quartile, and a note at its end."""
    low, middle, high = (scale * np.array([np.quantile(v, q) for v in values.values()]) for q in (0.25, 0.5, 0.75))
    places = range(len(values))
    axes.barh(places, middle, color=colors, alpha=0.8, xerr=np.stack([middle - low, high - middle]), error_kw={"lw": 1})
    axes.set_yticks(places, list(values), fontsize=8)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * high.max())
    for place, end, note in zip(places, high, notes, strict=True):
        axes.text(end, place, f" {note}", va="center", fontsize=8)


def _plain_numbers(axis: Axis) -> None:
    """Label the ticks of a logarithmic axis 10, 20, 50 instead of with powers of 10."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else ""))


def _peer_note(ratio: Result | None) -> str:
    return "" if ratio is None else f" ({ratio['median']:.2f})"


def _threads(environment: Result) -> str:
    return f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"


def _save(figure: Figure, result: Result, out: Path) -> None:
    """Write a PNG, with the device and the versions that the numbers depend on in a line at the bottom."""
    where = result["environment"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "onnxruntime", "openvino") if name in where)
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    figure.supxlabel(f"{device}, {_threads(where)}, {packages}", fontsize=7, color="grey")
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
