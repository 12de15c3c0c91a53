"""A small segmentation data set, drawn."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {0: (0, 0, 0), 1: (200, 0, 0), 2: (0, 90, 200), 255: (255, 255, 255)}


def draw_pair(
    root: Path, folders: str, name: str, seed: int, colors: Mapping[int, tuple[int, int, int]] | None = None
) -> None:
    """Noise of 211 x 97 pixels, and a mask of the values 0, 1, 2 and 255 in both directions."""
    images, masks = (root / folder for folder in folders.split())
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (97, 211, 3), dtype=np.uint8)
    mask = np.zeros((97, 211), np.uint8)
    mask[10:50, 20:100] = 1
    mask[40:90, 90 + seed : 200] = 2
    mask[:5, :30] = 255
    for folder, pixels in ((images, noise), (masks, mask)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        painted = pixels if colors is None or pixels.ndim == 3 else _paint(pixels, colors)
        Image.fromarray(painted).save(folder / f"{name}.png")


def draw_data(
    root: Path,
    train: str = "train/images train/masks",
    val: str = "val/images val/masks",
    colors: Mapping[int, tuple[int, int, int]] | None = None,
) -> Path:
    """Three pairs to train on and one held out, in the folders of images and of masks; returns ``root``."""
    for seed, name in enumerate(("0", "1", "deep/2")):
        draw_pair(root, train, name, seed, colors)
    draw_pair(root, val, "3", 3, colors)
    return root


def _paint(mask: np.ndarray, colors: Mapping[int, tuple[int, int, int]]) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    for value, color in colors.items():
        table[value] = color
    return table[mask]
