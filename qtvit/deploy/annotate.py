"""Writing annotated pictures: contact sheets of many small ones, and single ones with a caption."""

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from qtvit.console import shorten

QUALITY = 92
"""JPEG quality."""
PER_SHEET = 60
"""Number of pictures on a sheet of predictions."""
TILE = 176
"""Side of a picture on a sheet, in pixels."""
GAP = 10
"""Space between pictures on a sheet, in pixels."""
SMALL, LARGE = 14, 18
"""Font sizes of captions and titles on a sheet, in pixels."""
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf")
"""System fonts, in order of preference; PIL's own has little beyond ASCII."""


@dataclass(frozen=True)
class Tile:
    """A picture on a sheet, with lines of text below it.

    Attributes:
        image: already shrunk by `thumbnail`, so that a sheet of large photographs fits into memory.
        lines: text; lines that are wider than the tile are cut.
        color: of the text.
    """

    image: Image.Image
    lines: Sequence[str]
    color: str = "black"


def thumbnail(image: Image.Image, side: int = TILE) -> Image.Image:
    """Resize ``image`` to fit into a square of ``side`` pixels; pixels of very small images stay visible as squares."""
    method = Image.Resampling.NEAREST if side / max(image.size) >= 3 else Image.Resampling.LANCZOS
    return ImageOps.contain(image, (side, side), method)


def contact_sheet(
    tiles: Sequence[Tile], title: str = "", side: int = TILE, max_columns: int | None = None
) -> Image.Image:
    """Arrange ``tiles``, whose pictures have ``side`` pixels, in rows below the ``title``."""
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
    """Put ``image``, in its own size, above a bar with ``text``; narrow images get margins as room for the text."""
    width = max(image.width, 240)
    size = max(SMALL, round(width / 40))
    captioned = Image.new("RGB", (width, image.height + 2 * size), "black")
    captioned.paste(image, ((width - image.width) // 2, 0))
    position = size // 2, image.height + size
    ImageDraw.Draw(captioned).text(position, _fit(text, width - size, size), "white", font(size), anchor="lm")
    return captioned


@dataclass
class SheetWriter:
    """Writes pictures with their predictions, `PER_SHEET` to a sheet: sheet.png, sheet-2.png, …

    Attributes:
        path: of the first sheet.
        side: of a picture, in pixels.
        written: the sheets written so far; `close` writes the last one.
    """

    path: Path
    side: int = TILE
    tiles: list[Tile] = field(default_factory=list, init=False)
    written: list[Path] = field(default_factory=list, init=False)

    def add(self, image: Image.Image, name: Path, captions: Sequence[str]) -> None:
        """Add a picture; its first caption and its file name are written below it."""
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


@dataclass
class FolderWriter:
    """Writes pictures in their own size into ``folder``, with captions in a bar below: JPEG as JPEG, all others as PNG.

    Attributes:
        written: the files written so far.
    """

    folder: Path
    written: list[Path] = field(default_factory=list, init=False)
    _taken: set[Path] = field(default_factory=set, init=False)

    def add(self, image: Image.Image, name: Path, captions: Sequence[str]) -> None:
        """Write a picture to ``folder / name``, with a number if another one was written there."""
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
    """``text`` on one line, cut to at most ``width`` pixels."""
    text = text.replace("\n", " ")
    num_chars = len(text)
    while num_chars > 1 and font(size).getlength(shorten(text, num_chars)) > width:
        num_chars -= 1
    return shorten(text, num_chars)


@functools.lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of ``size`` pixels, with more than ASCII if there is one on this machine."""
    names = list(FONTS)
    if (matplotlib := importlib.util.find_spec("matplotlib")) and matplotlib.origin:  # which brings a font
        names.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / FONTS[0]))
    for name in names:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
