"""Colours of classes: a palette for any number of them, and colours as numbers."""

import re

import numpy as np

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """That many different colours, the first black: those of PASCAL VOC, which go on beyond its 21 classes.

    The bits of a class's number are dealt out to red, green and blue in turn, into the highest free bit of each.
    """
    colors = []
    for label in range(num_classes):
        channels = [0, 0, 0]
        for bit in range(24):
            channels[bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


def color_keys(colors: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 colours as (…) int32 numbers, 24 bits each."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def key_color(key: int) -> Color:
    """The colour that `color_keys` makes ``key`` of."""
    return key >> 16, key >> 8 & 255, key & 255


def parse_color(text: str) -> Color | None:
    """The colour in "128 64 0"; None if there is none."""
    match = re.fullmatch(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})", text.strip())
    if match is None:
        return None
    red, green, blue = map(int, match.groups())
    return (red, green, blue) if max(red, green, blue) <= 255 else None


def format_color(color: Color) -> str:
    """As `parse_color` reads it."""
    return "{} {} {}".format(*color)
