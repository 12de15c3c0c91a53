"""Draws objects on their picture."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from qtvit.deploy.annotate import font

from .predict import Detections

MIN_SIDE = 320
"""Pixels; a picture whose longer side is shorter is enlarged to about this, so that its labels are legible."""
OPACITY = 0.45
"""Opacity of masks."""
GOLDEN_RATIO = 0.618034
"""Consecutive multiples of it, modulo 1, are far apart on the circle of hues."""


def draw_detections(image: Image.Image, found: Detections, names: Sequence[str]) -> Image.Image:
    """``image`` with masks, boxes and labels in the colour of each object's class; a small picture is enlarged.

    Args:
        image: the picture, RGB.
        found: its objects. No scores are written if all are 1, as those of labelled objects are.
        names: all classes; a class's position decides its colour.
    """
    factor = max(round(MIN_SIDE / max(image.size)), 1)
    colors = [_color(names.index(label)) for label in found.labels]
    pixels = np.asarray(image, np.float32)
    if found.masks is not None:
        pixels = pixels.copy()
        for mask, color in zip(found.masks.numpy(), colors, strict=True):
            pixels[mask] += OPACITY * (np.array(color, np.float32) - pixels[mask])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    picture = picture.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    width = max(round(max(picture.size) / 400), 1)
    letters = font(max(12, round(max(picture.size) / 45)))
    certain = all(score == 1 for score in found.scores)
    drawn = list(zip(found.labels, found.scores, (factor * found.boxes).tolist(), colors, strict=True))
    drawn.reverse()  # so that the most certain are on top
    for _, _, box, color in drawn:
        draw.rectangle(box, outline=color, width=width)
    for label, score, (left, top, _, _), color in drawn:
        text = label if certain else f"{label} {score:.0%}"
        bounds = draw.textbbox((0, 0), text, letters)
        x = min(max(left, 0), max(picture.width - bounds[2], 0))
        y = top - bounds[3] if top >= bounds[3] else top
        draw.rectangle((x, y, x + bounds[2] + 2, y + bounds[3]), fill=color)
        draw.text((x + 1, y), text, "black", letters)
    return picture


def _color(index: int) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, 0.65, 1.0))
