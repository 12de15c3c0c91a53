"""Colours of classes: a palette for any number of them, and colours as numbers and as text."""

import re

import numpy as np

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """The colours of PASCAL VOC, continued beyond its 21 classes: ``num_classes`` different ones, the first black.

    The bits of a class's number are dealt out to red, green and blue in turn, into the highest free bit of each.
    """
    colors = []
    for label in range(num_classes):
        red, green, blue = (sum((label >> 3 * i + channel & 1) << 7 - i for i in range(8)) for channel in range(3))
        colors.append((red, green, blue))
    return tuple(colors)


def color_keys(colors: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 colours as (…) int32 numbers, 24 bits each."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def key_color(key: int) -> Color:
    """The colour of which `color_keys` makes ``key``."""
    return key >> 16, key >> 8 & 255, key & 255


def parse_color(text: str) -> Color | None:
    """The colour in a text such as "128 64 0"; None if it is not a colour."""
    match = re.fullmatch(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})", text.strip())
    red, green, blue = map(int, match.groups()) if match else (256, 256, 256)
    return (red, green, blue) if max(red, green, blue) <= 255 else None


def format_color(color: Color) -> str:
    """The text that `parse_color` reads."""
    return "{} {} {}".format(*color)
