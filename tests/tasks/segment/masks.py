"""Data for segmentation, drawn: boxes of two colours on grey, some of it of no class."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("ground", "red", "blue")
PAINT = {0: (120, 120, 120), 1: (210, 40, 30), 2: (30, 60, 220)}


def draw_masks(
    root: Path,
    num_train: int = 8,
    num_val: int = 3,
    colors: Mapping[int, tuple[int, int, int]] | None = None,
    num_ignored: int = 3,
) -> Path:
    """Images of 40 x 48 pixels, and a last one of 97 x 211, with index masks or masks in ``colors``; classes.txt.

    The first ``num_ignored`` rows are of no class.
    """
    for split, number in (("train", num_train), ("val", num_val)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index in range(number):
            rng = np.random.default_rng([index, split == "val"])
            height, width = (97, 211) if split == "val" and index == number - 1 else (40, 48)
            mask = np.zeros((height, width), np.uint8)
            for label in (1, 2):
                top, left = rng.integers(height // 2), rng.integers(width // 2)
                mask[top : top + height // 3, left : left + width // 3] = label
            image = np.array([PAINT[label] for label in range(3)], np.uint8)[mask]
            image = (image + rng.integers(-9, 10, image.shape)).astype(np.uint8)
            mask[:num_ignored] = 255
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            if colors is not None:
                table = np.zeros((256, 3), np.uint8)
                table[[*colors]] = [*colors.values()]
                mask = table[mask]
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    given = [f"{name}: {' '.join(map(str, colors[i]))}" if colors else name for i, name in enumerate(NAMES)]
    (root / "classes.txt").write_text("\n".join(given) + "\n")
    return root
