"""Points of an image: (x, y) in pixels, x to the right and y down; (0, 0) is the centre of the upper left pixel."""

import math
import re
from typing import Any

import numpy as np
from torch import Tensor

Point = tuple[float, float]


def parse_point(text: str) -> Point:
    """The point in a text such as "120,80"; ValueError for any other text."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = math.nan
    if not math.isfinite(x + y):
        raise ValueError(f"a point is X,Y in pixels such as 120,80, got {text!r}")
    return x, y


def parse_grid(text: str) -> tuple[int, int]:
    """The rows and columns in a text such as "3x4"; ValueError for any other text."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not rows or not columns:
        raise ValueError(f"a grid is ROWSxCOLUMNS such as 3x4, got {text!r}")
    return rows, columns


def grid_points(rows: int, columns: int, size: tuple[int, int]) -> list[Point]:
    """The centres of ``rows`` x ``columns`` equal fields of an image of ``size`` (width, height), row by row."""

    def centres(count: int, side: int) -> list[float]:  # kept on the image where fields are smaller than pixels
        return [min(max((i + 0.5) * side / count - 0.5, 0), side - 1) for i in range(count)]

    return [(x, y) for y in centres(rows, size[1]) for x in centres(columns, size[0])]


def check_points(at: Any, size: tuple[int, int]) -> list[Point]:
    """``at``, a point or several, as a list; ValueError if one is not inside an image of ``size`` (width, height)."""
    try:
        points = np.asarray(at.tolist() if isinstance(at, Tensor) else at)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, or a list of tensors on a GPU
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
