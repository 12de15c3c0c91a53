"""Points of an image: (x, y) in pixels, x to the right and y down; (0, 0) is the centre of the upper left pixel."""

import math
import re
from typing import Any

import numpy as np
from torch import Tensor

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
    ys, xs = (_centres(count, side) for count, side in ((rows, size[1]), (columns, size[0])))
    return [(x, y) for y in ys for x in xs]


def _centres(count: int, side: int) -> list[float]:
    """Of ``count`` equal parts of ``side`` pixels, but no nearer to its ends than the first and last pixel."""
    return [min(max((i + 0.5) * side / count - 0.5, 0), side - 1) for i in range(count)]


def check_points(at: Any, size: tuple[int, int]) -> list[Point]:
    """The point or points ``at``, all inside an image of ``size`` (width, height); ValueError if they are not."""
    try:
        points = np.asarray(at.tolist() if isinstance(at, Tensor) else at)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, or one of tensors on a GPU
        points = np.empty(0)
    if points.dtype.kind not in "iuf" or points.shape[-1:] != (2,) or points.ndim > 2 or not len(points):
        raise ValueError(f"at is a point (x, y), two numbers, or a list of points, got {at!r:.80}")
    listed: list[Point] = [(x, y) for x, y in points.astype(float).reshape(-1, 2).tolist()]
    for point in listed:
        if not all(0 <= z <= side - 1 for z, side in zip(point, size, strict=True)):
            raise ValueError(
                f"point {point[0]:g},{point[1]:g} is outside the image, which is {size[0]} x {size[1]} pixels "
                f"(x from 0 to {size[0] - 1}, y from 0 to {size[1] - 1})"
            )
    return listed
