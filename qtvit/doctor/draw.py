"""A picture of the value ranges of a model's layers."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qtvit.files import replacing

from .measure import FP16, RELEASED, Numbers
from .report import Operation, Report

LIMITS = {
    "fp16 makes 0 of": FP16.smallest_normal * FP16.eps,
    "loses digits of": FP16.smallest_normal,
    "overflows at": FP16.max,
}
"""Magnitudes at which fp16 loses or overflows numbers."""
SMALLEST = 1e-10
"""Lower bound of the axis; smaller numbers, such as some squares, matter in no format."""
COLORS = {"in fp16": "steelblue", "kept in fp32": "darkorange", "in the released code": "crimson"}


def draw(report: Report, out: Path) -> None:
    """Write a PNG with a bar per layer, from its smallest magnitude above 0 to its largest, and a tick at its RMS.

    Operations that the model keeps in fp32 have bars of their own, and so do those of the released code.

    Raises:
        OSError: the file cannot be written.
    """
    bars = [(name, label, span) for name, ops in report.layers().items() for label, span in _spans(ops)]
    figure = Figure(figsize=(11, 1.8 + 0.17 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, label, (low, high, typical)) in enumerate(bars):
        axes.barh(row, high - low, 0.8, low, color=COLORS[label], alpha=0.75)
        axes.plot([typical, typical], [row - 0.4, row + 0.4], color="black", linewidth=1)
    for label, limit in LIMITS.items():
        axes.axvline(limit, color="black", linestyle="--", linewidth=0.8)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{label}\n{limit:.3g}", (limit, 1), (0, 3), fontsize=8, **where)  # type: ignore[arg-type]
    lows, highs = zip(*(span[:2] for _, _, span in bars), strict=True)
    axes.set(xscale="log", ylim=(len(bars) - 0.5, -0.5))
    axes.set(xlim=(min(*lows, LIMITS["fp16 makes 0 of"]) / 2, max(*highs, FP16.max) * 2))
    firsts = [row for row, (name, _, _) in enumerate(bars) if row == 0 or bars[row - 1][0] != name]
    axes.set_yticks(firsts, [bars[row][0] or "(the model itself)" for row in firsts], fontsize=7, parse_math=False)
    axes.set_xlabel("magnitude of the numbers in fp32, without zeros; tick: root mean square")
    axes.grid(axis="x", alpha=0.3)
    used = {label for _, label, _ in bars}
    patches = [Patch(color=color, alpha=0.75, label=label) for label, color in COLORS.items() if label in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    title = f"{report.model}: {report.num_images} images of {report.img_size[0]} × {report.img_size[1]}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _spans(ops: Sequence[Operation]) -> list[tuple[str, tuple[float, float, float]]]:
    """The bars of a layer: a key of `COLORS`, and its smallest and largest magnitude and root mean square."""
    parts: dict[str, list[Numbers]] = {label: [] for label in COLORS}
    for op in ops:
        if op.numbers.smallest < math.inf:
            kept = "in the released code" if op.site.op == RELEASED else "kept in fp32"
            parts[kept if "fp16" in op.kept else "in fp16"].append(op.numbers)
    spans = []
    for label, numbers in parts.items():
        if numbers:
            low = max(min(one.smallest for one in numbers), SMALLEST)
            high = max(*(max(abs(one.low), abs(one.high)) for one in numbers), low)
            signal = sum(one.signal for one in numbers if math.isfinite(one.signal))
            typical = math.sqrt(signal / sum(one.count for one in numbers))
            spans.append((label, (low, high, min(max(typical, low), high))))
    return spans
