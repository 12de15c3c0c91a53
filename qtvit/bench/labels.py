"""Names beside the points of a plot that cover neither each other nor a point."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

RADII = (7, 14, 24, 36, 50, 66, 84, 104)
"""Distances from the point that are tried, in points of 1/72 inch."""
NEAR = 14
"""Distance up to which it is plain which point a name belongs to."""
ANGLES = (0, 45, -45, 90, -90, 135, -135, 180, 22, -22, 67, -67, 112, -112, 157, -157)
"""Directions that are tried at each distance, in degrees from the right."""
POINT = 5
"""Half the side of the square that a label keeps off a point, in pixels."""


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colors: Sequence[Any],
    important: Sequence[bool],
    steps: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each name near its point, with a thin line where it is not next to it; ``important`` ones first, in bold.

    The limits of ``axes`` have to be final. Names keep off the line through ``steps``, whose corners are at the lower
    right. A name without any free place near its point is left out.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the layout settles; sizes are in pixels from here on
    pixels = axes.transData.transform(points)
    taken = [(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in pixels]
    corners = axes.transData.transform(steps).tolist() if steps else []
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        taken += [(x, y - 1, next_x, y + 1), (next_x - 1, y, next_x + 1, next_y)]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent().extents)
    inside = axes.get_window_extent().extents
    for index in sorted(range(len(points)), key=lambda i: not important[i]):
        weight = "bold" if important[index] else "normal"
        text = axes.annotate(
            names[index],
            points[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            color=colors[index],
            weight=weight,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": colors[index], "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        )
        box = Text.get_window_extent(text)  # an annotation's own has the line in it
        for (dx, dy), far in _offsets(box.width, box.height, figure.dpi):
            x, y = pixels[index] + (dx, dy)
            place = (x - box.width / 2, y - box.height / 2, x + box.width / 2, y + box.height / 2)
            if _contains(inside, place) and not any(_overlap(place, other) for other in taken):
                text.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))
                if not far and text.arrow_patch is not None:
                    text.arrow_patch.set_visible(False)
                taken.append(place)
                break
        else:
            text.remove()


def _offsets(width: float, height: float, dpi: float) -> Iterator[tuple[np.ndarray, bool]]:
    """Pixels from a point to the middle of a label of that size, the nearest first; and whether it is far off."""
    for radius in RADII:
        for angle in ANGLES:
            direction = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            yield direction * (radius * dpi / 72 + np.array([width, height]) / 2), radius > NEAR


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contains(outer: Sequence[float], inner: Sequence[float]) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]
