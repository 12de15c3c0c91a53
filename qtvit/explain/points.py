"""Points of an image: (x, y) in pixels, x to the right and y down, from its upper left corner."""

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

Point = tuple[float, float]


def parse_point(text: str) -> Point:
    """The point in a text such as "120,80"; ValueError if there is none."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = math.nan
    if not math.isfinite(x + y):
        raise ValueError(f"a point is X,Y in pixels such as 120,80, got {text!r}")
    return x, y


def parse_grid(text: str) -> tuple[int, int]:
    """Rows and columns in a text such as "3x4"; ValueError if there are none."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not rows or not columns:
        raise ValueError(f"a grid is ROWSxCOLUMNS such as 3x4, got {text!r}")
    return rows, columns


def grid_points(rows: int, columns: int, size: tuple[int, int]) -> list[Point]:
    """The centres of equal fields, row by row, on an image of ``size`` (width, height); of one field, its centre."""
    width, height = size
    return [
        ((column + 0.5) * width / columns, (row + 0.5) * height / rows)
        for row in range(rows)
        for column in range(columns)
    ]


def check_points(at: Point | Sequence[Point], size: tuple[int, int]) -> list[Point]:
    """The point or points ``at``, all inside an image of ``size`` (width, height); ValueError if they are not."""
    listed: list[Any] = [at] if len(at) and isinstance(at[0], Real) else list(at)
    if not listed or not all(len(point) == 2 and all(isinstance(z, Real) for z in point) for point in listed):
        raise ValueError(f"at is a point (x, y) or a list of points, got {at!r}")
    for point in listed:
        if not all(0 <= z < side for z, side in zip(point, size, strict=True)):
            raise ValueError(
                f"point {point[0]:g},{point[1]:g} is outside the image, which is {size[0]} x {size[1]} pixels "
                f"(x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1})"
            )
    return [(float(x), float(y)) for x, y in listed]
