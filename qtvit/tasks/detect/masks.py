"""The masks of up to millions of objects, in a few flat arrays."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Segments:
    """The masks of all objects of a file, as polygons or COCO's compressed RLE.

    They are flat arrays because a million small Python objects would take several times the memory, and every loader
    process would get its own copy: counting references writes to the memory pages that it shares with others.
    """

    values: np.ndarray  # x and y of the corners of all polygons in pixels, one after the other
    ring_ends: np.ndarray  # a 0, then where each polygon ends in values
    object_rings: np.ndarray  # a 0, then the number of polygons up to the end of each object's
    rle: bytes  # the strings of run lengths, one after the other
    object_rle: np.ndarray  # a 0, then where the string of each object ends in rle

    def encoded(self, index: int, height: int, width: int) -> dict[str, Any]:
        """The mask of an object as COCO's compressed RLE; an empty mask if it has none."""
        from pycocotools import mask

        if self.object_rle[index] < self.object_rle[index + 1]:
            counts = self.rle[self.object_rle[index] : self.object_rle[index + 1]]
            return {"size": [height, width], "counts": counts}
        first, last = self.object_rings[index : index + 2]
        ends = self.ring_ends[first : last + 1].tolist()
        rings = [self.values[start:end].tolist() for start, end in pairwise(ends)]
        if not rings:
            return mask.encode(np.zeros((height, width), np.uint8, order="F"))
        return mask.merge(mask.frPyObjects(rings, height, width))

    def ring_extents(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, 4) boxes around all polygons, and (R,) positions of the objects that they belong to."""
        starts = self.ring_ends[:-1] // 2
        if not len(starts):
            return np.zeros((0, 4)), np.zeros(0, np.int64)
        corners = self.values.reshape(-1, 2)
        extents = np.concatenate([np.minimum.reduceat(corners, starts), np.maximum.reduceat(corners, starts)], axis=1)
        return extents, np.repeat(np.arange(len(self.object_rings) - 1), np.diff(self.object_rings))

    def broken_rle(self, num_pixels: np.ndarray) -> list[int]:
        """Objects whose run lengths do not cover exactly the (M,) pixels of their images.

        From such run lengths pycocotools would make masks of whatever happens to be in memory.
        """
        wrong: list[int] = []
        step = 20_000  # objects at a time, to bound the memory of the arrays of numbers
        for start in range(0, len(num_pixels), step):
            ends = self.object_rle[start : start + step + 1]
            text = np.frombuffer(self.rle[ends[0] : ends[-1]], np.uint8)
            covered = _covered_pixels(text, ends - ends[0])
            broken = (np.diff(ends) > 0) & (covered != num_pixels[start : start + step])
            wrong += (start + np.flatnonzero(broken)).tolist()
        return wrong


def _covered_pixels(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(M,) pixels that each mask's run lengths add up to; -1 if the text is not run lengths.

    A number is a few characters. Each character holds five bits, lowest first, and a sixth bit that says whether more
    characters follow; the fifth bit of the last character is the sign. From the fourth number of a mask on, a number is
    the difference from the one two places before it. So the sum counts each number as often as there are numbers of its
    parity from its place on.
    """
    if not len(text):
        return np.full(len(ends) - 1, -1)
    given = np.diff(ends) > 0
    final = ends[1:][given] - 1
    more = ((text - 48) & 32) > 0
    proper = (text >= 48) & (text < 112)
    proper[final] &= ~more[final]
    more[final] = False  # no number goes on in the next mask
    valid = given & (np.diff(np.append(0, np.cumsum(proper))[ends]) == np.diff(ends))
    last = np.flatnonzero(~more)
    first = np.append(0, last[:-1] + 1)
    digit = np.arange(len(text)) - np.repeat(first, last - first + 1)
    digit = np.minimum(digit, 11)  # longer numbers are nonsense; a shift by 64 bits or more is undefined
    numbers = np.add.reduceat(((text - 48).astype(np.int64) & 31) << (5 * digit), first)
    negative = ((text[last] - 48) & 16) > 0
    numbers -= negative.astype(np.int64) << (5 * (digit[last] + 1))
    number_ends = np.searchsorted(last, ends)  # how many numbers end before each mask does
    counts = np.diff(number_ends)
    place = np.arange(len(numbers)) - np.repeat(number_ends[:-1], counts)
    remaining = np.repeat(counts, counts) - place
    times = np.where(place == 0, 1, (remaining + 1) // 2)
    sums = np.append(0, np.cumsum(numbers * times))[number_ends]
    return np.where(valid, np.diff(sums), -1)
