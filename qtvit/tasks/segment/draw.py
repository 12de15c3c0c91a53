"""Pictures of segmentations: class colours over the image, and a legend."""

from PIL import Image, ImageDraw

from qtvit.console import shorten
from qtvit.deploy.annotate import GAP, SMALL, font

from .predict import Segmentation

NAME_CHARS = 30
"""Characters of a class name in a legend."""


def draw_segmentation(image: Image.Image, found: Segmentation) -> Image.Image:
    """``image`` in its own size under the colours of its classes, above a legend with the share of each class."""
    size = max(SMALL, round(image.width / 60))
    letters = font(size)
    colors = dict(zip(found.names, found.mask_classes.colors, strict=True))
    places, left, row = [], GAP, 0
    for name, share in found.shares().items():
        text = f"{shorten(name, NAME_CHARS)} {share:.1%}"
        width = round(1.5 * size + letters.getlength(text)) + 2 * GAP
        if left > GAP and left + width > image.width:
            left, row = GAP, row + 1
        places.append((left, row, colors[name], text))
        left += width
    line = round(1.6 * size)
    picture = Image.new("RGB", (image.width, image.height + (row + 1) * line + GAP), "white")
    picture.paste(found.overlay(image), (0, 0))
    draw = ImageDraw.Draw(picture)
    for left, row, color, text in places:
        top = image.height + GAP // 2 + row * line
        draw.rectangle((left, top + size // 5, left + size, top + size // 5 + size), fill=color, outline="black")
        draw.text((left + round(1.5 * size), top), text, "black", letters)
    return picture
