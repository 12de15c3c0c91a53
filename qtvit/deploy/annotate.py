"""Pictures with text on them: sheets of many small ones, and single ones with a caption."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from qtvit.console import shorten

QUALITY = 92
"""Of JPEG files."""
PER_SHEET = 60
"""Pictures on a sheet of predictions."""
TILE = 176
"""Side in pixels of a picture on a sheet."""
GAP = 10
SMALL, LARGE = 14, 18
"""Font sizes on a sheet, in pixels."""
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf")
"""Looked for among the fonts of the system, in this order; PIL's own has little beyond ASCII."""


@dataclass(frozen=True)
class Tile:
    """A picture on a sheet, and the lines below it.

    Attributes:
        image: shrunk already (`thumbnail`), so that a sheet of large photographs fits into memory.
        lines: of text; what does not fit into the width is cut.
        color: of the text.
    """

    image: Image.Image
    lines: Sequence[str]
    color: str = "black"


def thumbnail(image: Image.Image, side: int = TILE) -> Image.Image:
    """``image`` at the largest size that fits into a square; the pixels of a very small one stay visible squares."""
    enlarged = side / max(image.size)
    return ImageOps.contain(
        image, (side, side), Image.Resampling.NEAREST if enlarged >= 3 else Image.Resampling.LANCZOS
    )


def contact_sheet(
    tiles: Sequence[Tile], title: str = "", side: int = TILE, max_columns: int | None = None
) -> Image.Image:
    """One picture of all ``tiles``, in rows from left to right, below the ``title``; ``side`` is that of a picture."""
    columns = min(len(tiles), max_columns or (10 if len(tiles) > 24 else 8))
    line_height = round(SMALL * 1.35)
    num_lines = max(len(tile.lines) for tile in tiles)
    top = 2 * GAP + round(LARGE * 1.3) if title else GAP
    cell = side + GAP, side + 4 + num_lines * line_height + GAP
    width = max(columns * cell[0] + GAP, round(font(LARGE).getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (width, top + -(-len(tiles) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font(LARGE))
    for index, tile in enumerate(tiles):
        left, above = GAP + index % columns * cell[0], top + index // columns * cell[1]
        sheet.paste(tile.image, (left + (side - tile.image.width) // 2, above + (side - tile.image.height) // 2))
        for row, line in enumerate(tile.lines):
            position = left, above + side + 4 + row * line_height
            draw.text(position, _fit(line, side, SMALL), tile.color, font(SMALL))
    return sheet


def add_caption(image: Image.Image, text: str) -> Image.Image:
    """``image`` in its own size above a bar with ``text``; a very narrow one gets margins, for the text to fit."""
    width = max(image.width, 240)
    size = max(SMALL, round(width / 40))
    captioned = Image.new("RGB", (width, image.height + 2 * size), "black")
    captioned.paste(image, ((width - image.width) // 2, 0))
    position = size // 2, image.height + size
    ImageDraw.Draw(captioned).text(position, _fit(text, width - size, size), "white", font(size), anchor="lm")
    return captioned


class SheetWriter:
    """Writes pictures with their predictions to ``path``, `PER_SHEET` to a sheet: sheet.png, sheet-2.png, …

    Args:
        path: of the first sheet.
        side: of a picture in pixels.

    Attributes:
        written: the sheets so far; the last one is written by `close`.
    """

    def __init__(self, path: Path, side: int = TILE) -> None:
        self.path = path
        self.side = side
        self.tiles: list[Tile] = []
        self.written: list[Path] = []

    def add(self, image: Image.Image, name: Path, captions: Sequence[str]) -> None:
        """Add a picture with the first of its ``captions`` and the last part of its ``name``."""
        self.tiles.append(Tile(thumbnail(image, self.side), (*captions[:1], name.name)))
        if len(self.tiles) == PER_SHEET:
            self.close()

    def close(self) -> None:
        if self.tiles:
            number = len(self.written) + 1
            out = self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number}")
            contact_sheet(self.tiles, side=self.side).save(out, quality=QUALITY)
            self.written.append(out)
            self.tiles = []


class FolderWriter:
    """Writes pictures in their own size, with captions in a bar below, into a folder: JPEG stays JPEG, all else becomes
    PNG.

    Attributes:
        written: the files so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self._taken: set[Path] = set()

    def add(self, image: Image.Image, name: Path, captions: Sequence[str]) -> None:
        """Write a picture to ``folder / name``, numbered when another one has gone there."""
        plain = self.folder / name.with_suffix(name.suffix if name.suffix.lower() in (".jpg", ".jpeg") else ".png")
        out, number = plain, 1
        while out in self._taken:
            number += 1
            out = plain.with_stem(f"{plain.stem}-{number}")
        out.parent.mkdir(parents=True, exist_ok=True)
        captioned = add_caption(image, "   ".join(captions)) if captions else image
        captioned.save(out, quality=QUALITY)
        self._taken.add(out)
        self.written.append(out)

    def close(self) -> None:
        pass


def _fit(text: str, width: int, size: int) -> str:
    """``text`` on one line, cut so that it is at most ``width`` pixels wide."""
    text, letters = text.replace("\n", " "), font(size)
    num_chars = len(text)
    while num_chars > 1 and letters.getlength(shorten(text, num_chars)) > width:
        num_chars -= 1
    return shorten(text, num_chars)


@functools.lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of this size with more than ASCII, if there is one."""
    names = list(FONTS)
    if (matplotlib := importlib.util.find_spec("matplotlib")) and matplotlib.origin:  # it brings a font with it
        names.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / FONTS[0]))
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
