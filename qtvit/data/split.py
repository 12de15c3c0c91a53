"""Holding out a part of labelled images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .images import ImageFile, ImageSource, relative_path

Sample = tuple[ImageSource, int]
"""An image and its label."""


def stratified_split(
    samples: Sequence[Sample], val_fraction: float, seed: int, root: Path | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Hold out ``val_fraction`` of every class (at least one image, at most all but one) into a second list.

    Who is held out follows from a hash of the seed and the path below ``root`` (or the position, without one). So it
    does not change when the folder moves, and hardly when images are added or removed.
    """

    def order(item: tuple[int, Sample]) -> bytes:
        position, (source, _) = item
        name = relative_path(source, root) if root and isinstance(source, ImageFile) else str(position)
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    by_class: dict[int, list[Sample]] = {}
    for _, sample in sorted(enumerate(samples), key=order):
        by_class.setdefault(sample[1], []).append(sample)
    train: list[Sample] = []
    val: list[Sample] = []
    for label in sorted(by_class):
        members = by_class[label]
        if len(members) < 2:
            raise ValueError(f"{members[0][0]!s}: the only image of its class; two or more are needed to hold some out")
        num_val = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val += members[:num_val]
        train += members[num_val:]
    return train, val


def choose_by_name(names: Sequence[str], num_images: int | None) -> list[int]:
    """Positions of ``num_images`` of the names, in order; None: of all.

    Which ones follows from a hash of each name, so a larger choice holds a smaller one.

    Raises:
        ValueError: they are more than there are, or none.
    """
    if num_images is None:
        return list(range(len(names)))
    if not 1 <= num_images <= len(names):
        raise ValueError(f"--train-images must be from 1 to {len(names)}, all there are to train on; got {num_images}")
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    return sorted(ranked[:num_images])
