"""The ranges of a model's layers as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qtvit.files import replacing

from .measure import FP16, RELEASED
from .report import Operation, Report

LIMITS = {
    "fp16 makes 0 of": FP16.smallest_normal * FP16.eps,
    "loses digits of": FP16.smallest_normal,
    "overflows at": FP16.max,
}
"""Where fp16 ends."""
SMALLEST = 1e-10
"""Where the axis begins, at the least: some squares are of no account to any format."""
COLORS = {"in fp16": "steelblue", "kept in fp32": "darkorange", "in the released code": "crimson"}


def draw(report: Report, out: Path) -> None:
    """Write a PNG with a bar for each layer, from the smallest magnitude above 0 to the largest, and a tick at the root
    mean square.

    Operations that the model keeps in fp32 have a bar of their own, and so have those of the released code.

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
    used = [
        Patch(color=color, alpha=0.75, label=label) for label, color in COLORS.items() if label in {b[1] for b in bars}
    ]
    figure.legend(handles=used, loc="outside lower center", ncols=len(used), fontsize=8)
    height, width = report.img_size
    title = f"{report.model}: {report.num_images} images of {height} × {width}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _spans(ops: Sequence[Operation]) -> list[tuple[str, tuple[float, float, float]]]:
    """The bars of a layer: a key of `COLORS`, and smallest magnitude, largest, and root mean square."""
    parts = {
        "in fp16": [op for op in ops if "fp16" not in op.kept],
        "kept in fp32": [op for op in ops if "fp16" in op.kept and op.site.op != RELEASED],
        "in the released code": [op for op in ops if op.site.op == RELEASED],
    }
    spans = []
    for label, part in parts.items():
        numbers = [op.numbers for op in part if op.numbers.smallest < math.inf]
        if numbers:
            low = max(min(one.smallest for one in numbers), SMALLEST)
            high = max(*(max(abs(one.low), abs(one.high)) for one in numbers), low)
            signal = sum(one.signal for one in numbers if math.isfinite(one.signal))
            typical = math.sqrt(signal / sum(one.count for one in numbers))
            spans.append((label, (low, high, min(max(typical, low), high))))
    return spans
