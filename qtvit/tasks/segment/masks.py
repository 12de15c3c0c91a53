"""Masks: images whose values say which class each pixel has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from qtvit.data.images import decode
from qtvit.errors import some

from .palette import Color, color_keys, default_palette, format_color, key_color

MAX_VALUE = 65535
"""Largest value of an index mask: 16 bits."""

MAX_COUNTED = 1000
"""Values of a mask that a check keeps."""

NUM_SHOWN = 5
"""Values that a message lists."""

LABEL = np.int16
"""Type of labels in memory."""

_UNKNOWN = np.iinfo(LABEL).min
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class MaskClasses:
    """What the values of masks mean.

    An index mask has one channel, which is the value of each pixel's class; a colour mask has three, which are its
    colour.

    Raises:
        ValueError: names, values or colours are not distinct or not possible.
    """

    names: tuple[str, ...]  # C classes
    values: tuple[int, ...]  # of the classes in index masks, in the order of names
    ignored: tuple[int, ...] = ()  # values in index masks of pixels without a class
    colors: tuple[Color, ...] = ()  # of the classes in pictures and, with by_color, in colour masks
    ignored_colors: tuple[Color, ...] = ()  # colours in colour masks of pixels without a class
    by_color: bool = False  # whether masks may be colour masks
    ignore_index: int = 255  # the label of pixels without a class

    def __post_init__(self) -> None:
        if not self.colors:
            object.__setattr__(self, "colors", default_palette(len(self.names)))
        assert len(self.names) == len(self.values) == len(self.colors)
        if len(self.names) < 2:
            raise ValueError(f"{len(self.names)} class{'es' * (not self.names)} ({some(self.names)}); two are needed")
        if 0 <= self.ignore_index < len(self.names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is the label of class {self.names[self.ignore_index]}; give one "
                f"from {len(self.names)} on, or -1"
            )
        last = np.iinfo(LABEL).max
        if not _UNKNOWN < self.ignore_index <= last:
            raise ValueError(f"ignore_index must be from {_UNKNOWN + 1} to {last}, got {self.ignore_index}")
        if twice := _doubled(self.names):
            raise ValueError(f"two classes have the name {twice[0]}")
        if wrong := [value for value in (*self.values, *self.ignored) if not 0 <= value <= MAX_VALUE]:
            raise ValueError(f"mask value {wrong[0]}; expected 0 to {MAX_VALUE}")
        if twice := _doubled((*self.values, *self.ignored)):
            raise ValueError(f"mask value {twice[0]} is given two meanings; {self._values()}")
        if self.by_color and (twice := _doubled((*self.colors, *self.ignored_colors))):
            raise ValueError(f"the colour {format_color(twice[0])} is given two meanings")

    def read(self, path: Path) -> np.ndarray:
        """(H, W) labels from a mask file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the mask cannot be read, or has values that are of no class; the message names the file.
        """
        mask = read_mask(path)
        labels = self._look_up(self.as_index(mask))
        if (labels == _UNKNOWN).any():
            raise ValueError(f"{path}: {self.unknown(self.plain(count_values(mask)))}")
        return labels

    def as_index(self, mask: np.ndarray) -> np.ndarray:
        """Reduce an index mask that was saved with three equal channels to one; return other masks as they are."""
        return mask[..., 0] if mask.ndim == 3 and not self.by_color and (mask == mask[..., :1]).all() else mask

    def plain(self, counts: "ValueCounts") -> "ValueCounts":
        """The same as `as_index`, for the values of a mask."""
        if not counts.color or self.by_color or any(len(set(key_color(key))) > 1 for key in counts.pixels):
            return counts
        pixels = {key & 255: count for key, count in counts.pixels.items()}
        return ValueCounts(pixels, color=False, num_rare=counts.num_rare)

    def unknown(self, counts: "ValueCounts") -> str | None:
        """What is wrong with these values of a mask: which have no class, and how many pixels have them."""
        if counts.color and not self.by_color:
            return f"a colour mask, but there are no colours of the classes; its colours: {counts}"
        known = self._color_labels if counts.color else self._value_labels
        rest = {value: count for value, count in counts.pixels.items() if value not in known}
        if not rest:
            return None
        unknown = ValueCounts(rest, counts.color, counts.num_rare)
        if counts.color:
            return f"colours that no class has: {unknown}; those to ignore go under ignore_colors in classes.yaml"
        return f"values that no class has: {unknown}; {self._values()}"

    def label_counts(self, counts: "ValueCounts") -> np.ndarray:
        """(C,) pixels of each class among these values of a mask; pixels without a class do not count."""
        known = self._color_labels if counts.color else self._value_labels
        result = np.zeros(len(self.names), np.int64)
        for value, count in counts.pixels.items():
            if (label := known.get(value, self.ignore_index)) != self.ignore_index:
                result[label] += count
        return result

    def paint(self, labels: np.ndarray) -> Image.Image:
        """The colour mask of (H, W) labels; ignored pixels get the first of the ignored colours, or white."""
        void = self.ignored_colors[0] if self.ignored_colors else (255, 255, 255)
        return Image.fromarray(np.array([*self.colors, void], np.uint8)[self._checked(labels)])

    def index_image(self, labels: np.ndarray) -> Image.Image:
        """The index mask of (H, W) labels, with the values that `read` reads.

        It has 8 bits and the classes' colours as its palette, or 16 bits if there are values above 255. Ignored pixels
        get the first of the ignored values, or the highest value that fits.
        """
        last = 255 if max((*self.values, *self.ignored[:1])) <= 255 else MAX_VALUE
        void = self.ignored[0] if self.ignored else last
        values = np.array([*self.values, void], np.uint16)[self._checked(labels)]
        if last == MAX_VALUE:
            return Image.fromarray(values)
        palette = np.full((256, 3), 255, np.uint8)
        palette[list(self.values)] = self.colors
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(palette.tobytes())
        return image

    def _checked(self, labels: np.ndarray) -> np.ndarray:
        """Labels with C in place of ``ignore_index``."""
        positions = np.where(labels == self.ignore_index, len(self.names), labels)
        assert ((positions >= 0) & (positions <= len(self.names))).all(), "labels that are no class"
        return positions

    def _look_up(self, mask: np.ndarray) -> np.ndarray:
        if mask.ndim == 3:
            keys = np.array(sorted(self._color_labels), np.int32) if self.by_color else np.zeros(1, np.int32)
            labels = np.array([self._color_labels.get(key, _UNKNOWN) for key in keys.tolist()], LABEL)
            found = color_keys(mask)
            position = np.searchsorted(keys, found).clip(max=len(keys) - 1)
            return np.where(keys[position] == found, labels[position], LABEL(_UNKNOWN))
        known = (mask >= 0) & (mask <= MAX_VALUE)
        return np.where(known, self._value_table[np.where(known, mask, 0)], LABEL(_UNKNOWN))

    @cached_property
    def _value_table(self) -> np.ndarray:
        table = np.full(MAX_VALUE + 1, _UNKNOWN, LABEL)
        table[list(self._value_labels)] = list(self._value_labels.values())
        return table

    @cached_property
    def _value_labels(self) -> dict[int, int]:
        return dict.fromkeys(self.ignored, self.ignore_index) | {v: label for label, v in enumerate(self.values)}

    @cached_property
    def _color_labels(self) -> dict[int, int]:
        if not self.by_color:
            return {}
        keys = color_keys(np.array([*self.colors, *self.ignored_colors], np.uint8)).tolist()
        return dict.fromkeys(keys, self.ignore_index) | dict(zip(keys, range(len(self.names)), strict=False))

    def _values(self) -> str:
        first, last = min(self.values), max(self.values)
        numbers = f"{first} to {last}" if last - first + 1 == len(self.values) else some(sorted(self.values), 20)
        ignored = f", and {some(self.ignored)} of none" if self.ignored else ""
        return f"those of the {len(self.values)} classes are {numbers}{ignored}"


@dataclass(frozen=True)
class ValueCounts:
    """How many pixels of a mask have which value."""

    pixels: Mapping[int, int]  # by value, or by colour as a number (`color_keys`)
    color: bool  # whether the mask is a colour mask
    num_rare: int = 0  # values that were left out because there are too many

    def __str__(self) -> str:
        shown = [f"{format_color(key_color(v)) if self.color else v} ({n:,} px)" for v, n in self._ranked()]
        num_more = len(shown[NUM_SHOWN:]) + self.num_rare
        return ", ".join(shown[:NUM_SHOWN]) + (f" and {num_more:,} more" if num_more else "")

    def without_rare(self) -> "ValueCounts":
        """The `MAX_COUNTED` most frequent values alone, because a noisy mask may have as many values as pixels."""
        num_rare = max(len(self.pixels) - MAX_COUNTED, 0)
        return ValueCounts(dict(self._ranked()[:MAX_COUNTED]), self.color, num_rare) if num_rare else self

    def _ranked(self) -> list[tuple[int, int]]:
        return sorted(self.pixels.items(), key=lambda item: (-item[1], item[0]))


def read_mask(path: Path) -> np.ndarray:
    """The values stored in a mask: (H, W) integers of an index mask, (H, W, 3) uint8 of a colour mask.

    For a palette image these are the indices. EXIF rotation, colour profiles and transparency are ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read as a mask, or is a JPEG; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mask file")
    image = decode(path, str(path))
    if image.format in ("JPEG", "MPO"):
        raise ValueError(f"{path}: {JPEG_MASK}")
    if image.mode in ("RGB", "RGBA"):
        return np.asarray(image)[..., :3]
    if image.mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if image.mode not in _INDEX_MODES:
        raise ValueError(
            f"{path}: a picture of mode {image.mode}, which is no mask; save masks as 8-bit grey or RGB PNG"
        )
    mask = np.asarray(image)
    return mask.astype(np.uint8) if mask.dtype == bool else mask


JPEG_MASK = "a mask saved as JPEG, whose lossy compression invents values; make the masks anew as PNG"
"""The message about such a mask, whatever its file name ends in."""


def count_values(mask: np.ndarray) -> ValueCounts:
    """Count the values of a mask as `read_mask` returns it."""
    color = mask.ndim == 3
    flat = (color_keys(mask) if color else mask).ravel()
    if flat.dtype == np.uint8:
        counts = np.bincount(flat, minlength=256)
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(flat, return_counts=True)
    return ValueCounts(dict(zip(values.tolist(), counts.tolist(), strict=True)), color)


def index_colors(path: Path) -> dict[int, Color]:
    """The palette of an image by index; empty if it has none. The file must be readable."""
    with Image.open(path) as image:
        channels = (image.getpalette() if image.mode == "P" else None) or []
    return dict(enumerate(zip(channels[::3], channels[1::3], channels[2::3], strict=False)))


def _doubled(items: Sequence) -> list:
    return [item for position, item in enumerate(items) if item in items[:position]]
