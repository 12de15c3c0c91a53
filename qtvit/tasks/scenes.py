"""Sample data for detection and segmentation: scenes of real handwritten digits among clutter, drawn from a seed."""

import colorsys
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes

from qtvit import console
from qtvit.data.digits import load_digits
from qtvit.data.images import open_image
from qtvit.data.sampling import derived_seed
from qtvit.data.split import stratified_split
from qtvit.device import ignore_interrupts, num_cores
from qtvit.errors import unknown_name
from qtvit.files import open_folder

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS = ("detect", "segment")
SIDES = (96, 161)
"""Range of a scene's width and height in pixels; the end is exclusive."""
DIGIT_HEIGHTS = (16.0, 56.0)
"""Smallest and largest height of a digit in pixels; heights are drawn uniformly on a logarithmic scale."""
MAX_DIGITS = 7
MIN_VISIBLE = 0.85
"""Smallest share of a digit's pixels that stays visible when later digits are drawn over it."""
MAX_OVERLAP = 0.3
"""Largest intersection of two digits' boxes, as a share of the smaller box."""
DIGIT_CONTRAST = 0.4
"""Smallest difference in luminance, 0 to 1, between a digit and the background colour."""
CLUTTER_CONTRAST = 0.18
"""Largest difference in luminance between clutter and the background colour."""
SETTINGS_FILE = "scenes.json"
"""File in the folder of `write_scenes` that holds its arguments."""

_VERSION = 1
_SCENES_PER_WORKER = 50  # fewer take less time than starting a process
_EMPTY = 0.03  # share of scenes without digits
_INK = 110  # of 255: the grey value from which a digit's pixel counts as drawn
_JPEG_QUALITY = 95
_CLASSES = ("background", *DIGIT_NAMES)
_COLORS = np.frombuffer(
    bytes.fromhex("000000 e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 aa6e28 aaffc3"), np.uint8
).reshape(-1, 3)


@dataclass(frozen=True)
class Scene:
    """A picture with n digits.

    Attributes:
        image: (H, W, 3) uint8.
        digits: (n,) which digits, 0 to 9.
        masks: (n, H, W) bool, the visible pixels of each digit; no two masks overlap.
    """

    image: np.ndarray
    digits: np.ndarray
    masks: np.ndarray

    def boxes(self) -> np.ndarray:
        """(n, 4) int64 left, top, right, bottom of the masks in pixels; right and bottom are exclusive."""
        return (masks_to_boxes(torch.from_numpy(self.masks)).long() + torch.tensor([0, 0, 1, 1])).numpy()

    def index_mask(self) -> np.ndarray:
        """(H, W) uint8: 0 for the background, 1 + the digit elsewhere."""
        return ((1 + self.digits)[:, None, None] * self.masks).sum(axis=0, dtype=np.uint8)


class SceneGenerator:
    """Draws scenes, each from the seed, split and index alone; the splits share no digit's image."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        train, val = stratified_split(load_digits()[1], val_fraction=0.2, seed=seed)
        self._digits = {
            split: [(np.asarray(open_image(source))[..., 0], label) for source, label in samples]
            for split, samples in (("train", train), ("val", val))
        }

    def scene(self, split: str, index: int) -> Scene:
        """Draw scene number ``index`` of "train" or "val"."""
        rng = np.random.default_rng(derived_seed(self.seed, list(self._digits).index(split), index))
        height, width = rng.integers(*SIDES, 2).tolist()
        ground = _color(rng, lambda luminance: 0.1 < luminance < 0.9, (0.0, 0.5))
        canvas = _clutter(rng, _texture(rng, height, width, ground), ground)
        placed: list[_Digit] = []
        number = 0 if rng.random() < _EMPTY else rng.integers(1, MAX_DIGITS + 1)
        low, high = np.log(DIGIT_HEIGHTS)
        # Large digits come first, so that they do not hide small ones.
        for size in sorted(np.exp(rng.uniform(low, high, number)), reverse=True):
            pixels, digit = self._digits[split][rng.integers(len(self._digits[split]))]
            ink = _enlarged(rng, pixels, size)
            corner = _place(rng, ink > 0.5, placed, height, width)
            if corner is None:
                continue
            top, left = corner
            cover = np.zeros((height, width))
            cover[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
            color = _digit_color(rng, ground, [other.color for other in placed])
            canvas = _blend(canvas, cover, _shaded(rng, color, height, width))
            for other in placed:
                other.mask &= cover <= 0.5
            placed.append(_Digit(digit, color, cover > 0.5, (ink > 0.5).sum(), (top, left, *ink.shape)))
        noise = rng.normal(0, 3, canvas.shape)
        image = (255 * canvas + noise).round().clip(0, 255).astype(np.uint8)
        masks = np.array([digit.mask for digit in placed], bool).reshape(-1, height, width)
        return Scene(image, np.array([digit.digit for digit in placed], np.int64), masks)


@dataclass
class _Digit:
    """A digit in a scene: its visible mask, its whole area in pixels, and its box as top, left, height and width."""

    digit: int
    color: np.ndarray
    mask: np.ndarray
    area: int
    window: tuple[int, int, int, int]


def _enlarged(rng: np.random.Generator, pixels: np.ndarray, size: float) -> np.ndarray:
    """Ink coverage, 0 to 1, of an 8 x 8 digit enlarged to about ``size`` pixels, slightly rotated and cropped."""
    scale = size / 8
    side = max(round(12 * scale), 12)
    # Rotated while it is large, so that small digits lose no detail.
    large = Image.fromarray(np.pad(pixels, 2)).resize((96, 96), Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    values = np.asarray(turned.resize((side, side), Image.Resampling.LANCZOS), np.float64)
    ink = ((values - _INK) / (96 / min(scale, 4)) + 0.5).clip(0, 1)
    rows, columns = np.flatnonzero((ink > 0.5).any(axis=1)), np.flatnonzero((ink > 0.5).any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, shape: np.ndarray, placed: list[_Digit], height: int, width: int
) -> tuple[int, int] | None:
    """Draw top and left at which the digit ``shape`` keeps the others legible; None if 20 draws find no such place."""
    free_height, free_width = height - shape.shape[0], width - shape.shape[1]
    if min(free_height, free_width) < 0:
        return None
    for _ in range(20):
        top, left = int(rng.integers(free_height + 1)), int(rng.integers(free_width + 1))
        if all(_is_legible(other, shape, top, left) for other in placed):
            return top, left
    return None


def _is_legible(other: _Digit, shape: np.ndarray, top: int, left: int) -> bool:
    """Whether enough of ``other`` stays visible if the digit ``shape`` is drawn at ``top`` and ``left``."""
    height, width = shape.shape
    other_top, other_left, other_height, other_width = other.window
    rows = min(top + height, other_top + other_height) - max(top, other_top)
    columns = min(left + width, other_left + other_width) - max(left, other_left)
    if min(rows, columns) <= 0:
        return True
    visible = other.mask.sum() - (other.mask[top : top + height, left : left + width] & shape).sum()
    smaller = min(height * width, other_height * other_width)
    return rows * columns <= MAX_OVERLAP * smaller and visible >= MIN_VISIBLE * other.area


def _digit_color(rng: np.random.Generator, ground: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Draw five colours that stand out from the background; returns the one farthest from the other digits' colours."""
    middle = _luminance(ground)
    drawn = [_color(rng, lambda value: abs(value - middle) > DIGIT_CONTRAST, (0.5, 1.0)) for _ in range(5)]
    return max(drawn, key=lambda color: min((float(np.abs(color - other).sum()) for other in others), default=0))


def _luminance(color: np.ndarray) -> float:
    return float(color @ (0.299, 0.587, 0.114))


def _color(rng: np.random.Generator, fits: Callable[[float], bool], saturation: tuple[float, float]) -> np.ndarray:
    """Draw an RGB colour, 0 to 1, with a saturation in this range and a luminance for which ``fits`` is true."""
    while True:
        hue, lightness, amount = rng.random(), rng.uniform(0.1, 0.95), rng.uniform(*saturation)
        color = np.array(colorsys.hls_to_rgb(hue, lightness, amount))
        if fits(_luminance(color)):
            return color


def _texture(rng: np.random.Generator, height: int, width: int, ground: np.ndarray) -> np.ndarray:
    """(H, W, 3) background around the colour ``ground``: soft patches, a light gradient, and sometimes stripes."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    angle = rng.uniform(0, 2 * math.pi, 2)
    light = 0.08 * (math.cos(angle[0]) * (rows - 0.5) + math.sin(angle[0]) * (columns - 0.5))
    if rng.random() < 0.4:
        phase = math.cos(angle[1]) * rows + math.sin(angle[1]) * columns
        light += 0.025 * np.sin(2 * math.pi * rng.uniform(6, 20) * phase)
    coarse = (255 * rng.random((*rng.integers(3, 12, 2), 3))).astype(np.uint8)
    patches = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255 - 0.5
    return ground + light[..., None] + 0.12 * patches


def _clutter(rng: np.random.Generator, canvas: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Draw strokes and polygons over the canvas, in colours closer to the background than those of digits."""
    height, width = canvas.shape[:2]
    middle = _luminance(ground)
    for _ in range(rng.integers(0, 7)):
        color = _color(rng, lambda value: 0.06 < abs(value - middle) < CLUTTER_CONTRAST, (0.2, 0.9))
        layer = Image.new("L", (2 * width, 2 * height))  # drawn at twice the size, for smooth edges
        draw = ImageDraw.Draw(layer)
        x, y = rng.uniform(0, (2 * width, 2 * height))
        size = rng.uniform(10, 60)
        if rng.random() < 0.5:
            corners = int(rng.integers(3, 7))
            radii = size * rng.uniform(0.6, 1, corners)
            turns = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(corners) / corners
            draw.polygon([*zip(x + radii * np.cos(turns), y + radii * np.sin(turns), strict=True)], fill=255)
        else:
            steps = np.array([x, y]) + rng.normal(0, size, (int(rng.integers(2, 5)), 2)).cumsum(axis=0)
            draw.line([*map(tuple, steps.tolist())], fill=255, width=int(rng.integers(2, 8)), joint="curve")
        canvas = _blend(canvas, np.asarray(layer.resize((width, height), Image.Resampling.BOX)) / 255, color)
    return canvas


def _shaded(rng: np.random.Generator, color: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) of one colour under a random light gradient."""
    rows, columns = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[:, None]
    return color + rng.uniform(-0.05, 0.05) * rows + rng.uniform(-0.05, 0.05) * columns


def _blend(canvas: np.ndarray, cover: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Draw ``color`` over ``canvas`` with the opacity ``cover``, (H, W) from 0 to 1."""
    return canvas + cover[..., None] * (color - canvas)


def write_scenes(
    folder: str | Path, task: str = "detect", num_train: int = 1000, num_val: int = 200, seed: int = 0
) -> Path:
    """Write scenes as data for a task; a folder that already holds the same scenes is left as it is.

    For "detect" the folder has COCO's layout, with masks as RLE and category ids ``10 * digit + 1``. For "segment" it
    has images, and masks with 0 for the background and 1 + the digit elsewhere. ``seed`` determines the scenes, which
    are the same for both tasks. If the writing is interrupted, no incomplete folder is left. Returns the folder.

    Raises:
        ValueError: the task is unknown, a number of scenes is below 1, or the folder has other content.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    for name, number in (("num_train", num_train), ("num_val", num_val)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")
    folder = Path(folder)
    settings = {"version": _VERSION, "task": task, "num_train": num_train, "num_val": num_val, "seed": seed}
    if folder.is_file():
        raise ValueError(f"{folder}: a file, where a folder for the scenes is expected")
    if folder.is_dir() and any(folder.iterdir()):
        if _settings_of(folder) == settings:
            return folder
        raise ValueError(f"{folder}: has other content than these scenes; remove it, or choose another folder")
    open_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        write = _write_detection if task == "detect" else _write_segmentation
        generator = SceneGenerator(seed)
        for split, number in (("train", num_train), ("val", num_val)):
            workers = min(num_cores(), number // _SCENES_PER_WORKER, 8)
            indices: Any = range(number)
            scenes: Iterable[Scene] = DataLoader(
                indices,
                batch_size=None,
                collate_fn=partial(generator.scene, split),  # what the workers do with each index
                num_workers=workers if workers > 1 else 0,
                worker_init_fn=ignore_interrupts,
            )
            write(temporary, split, console.progress(scenes, total=number, desc=f"Drawing {split}", unit="scene"))
        if task == "segment":
            lines = [f"{name}: {r} {g} {b}\n" for name, (r, g, b) in zip(_CLASSES, _COLORS, strict=True)]
            (temporary / "classes.txt").write_text("".join(lines), encoding="utf-8")
        (temporary / SETTINGS_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _settings_of(folder: Path) -> Any:
    try:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_segmentation(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(root / split / "images" / f"{index:05}.jpg", quality=_JPEG_QUALITY)
        mask = Image.fromarray(scene.index_mask()).convert("P")
        mask.putpalette(_COLORS.tobytes())
        mask.save(root / split / "masks" / f"{index:05}.png")


def _write_detection(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    from pycocotools.mask import encode

    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        height, width = scene.image.shape[:2]
        name = f"{index:05}.jpg"
        Image.fromarray(scene.image).save(root / split / name, quality=_JPEG_QUALITY)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        for digit, mask, box in zip(scene.digits.tolist(), scene.masks, scene.boxes().tolist(), strict=True):
            left, top, right, bottom = box
            rle = encode(np.asfortranarray(mask, np.uint8))
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": 10 * digit + 1}
            annotation |= {"bbox": [left, top, right - left, bottom - top], "area": int(mask.sum()), "iscrowd": 0}
            annotations.append({**annotation, "segmentation": {**rle, "counts": rle["counts"].decode()}})
    categories = [{"id": 10 * digit + 1, "name": name} for digit, name in enumerate(DIGIT_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
