"""Holding out a part of a set of labelled images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .images import ImageFile, ImageSource, relative_path

Sample = tuple[ImageSource, int]
"""An image and its label."""


def stratified_split(
    samples: Sequence[Sample], val_fraction: float, seed: int, root: Path | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Split into training and held-out samples: ``val_fraction`` of every class, at least one and not all, is held out.

    Which ones follows from a hash of the seed and the path below ``root`` (without ``root``, of the position). So it
    does not change when the folder moves, and hardly when images are added or removed. ValueError if a class has only
    one image.
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
    for _, members in sorted(by_class.items()):
        if len(members) < 2:
            raise ValueError(f"{members[0][0]!s}: the only image of its class; two or more are needed to hold some out")
        num_val = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val += members[:num_val]
        train += members[num_val:]
    return train, val


def choose_by_name(names: Sequence[str], num_images: int | None) -> list[int]:
    """Sorted positions of ``num_images`` of the names; all if it is None.

    Which ones follows from a hash of each name, so that a larger choice contains a smaller one. ValueError unless
    ``num_images`` is from 1 to the number of names.
    """
    if num_images is None:
        return list(range(len(names)))
    if not 1 <= num_images <= len(names):
        raise ValueError(f"--train-images must be from 1 to {len(names)}, all there are to train on; got {num_images}")
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    return sorted(ranked[:num_images])
