"""Sample data for detection and segmentation: scenes of real handwritten digits among clutter, drawn from a seed."""

import colorsys
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

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
"""Range of the scenes' width and height in pixels."""

DIGIT_HEIGHTS = (16.0, 56.0)
"""Smallest and largest digit in pixels; evenly on a logarithmic scale."""

MAX_DIGITS = 7
MIN_VISIBLE = 0.85
"""The part of a digit's pixels that later ones leave visible."""

MAX_OVERLAP = 0.3
"""The part of the smaller of two boxes that may lie in the other."""

DIGIT_CONTRAST = 0.4
"""Least difference between a digit and the ground in luminance, 0 to 1."""

CLUTTER_CONTRAST = 0.18
"""Largest difference between clutter and the ground."""

SETTINGS_FILE = "scenes.json"
"""In a folder that `write_scenes` has made: what it was asked for."""

_VERSION = 1
_SCENES_PER_WORKER = 50  # fewer take less time than a process to start
_EMPTY = 0.03
_INK = 110  # of 255: the pixels of a digit that count as drawn
_JPEG_QUALITY = 95
_CLASSES = ("background", *DIGIT_NAMES)
_COLORS = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (170, 110, 40),
    (170, 255, 195),
)


@dataclass(frozen=True)
class Scene:
    """A picture of digits.

    Attributes:
        image: (H, W, 3) uint8.
        digits: (n,) which ones.
        masks: (n, H, W) bool, what can be seen of each; no two overlap.
    """

    image: np.ndarray
    digits: np.ndarray
    masks: np.ndarray

    def boxes(self) -> np.ndarray:
        """(n, 4) left, top, right, bottom of the masks in pixels."""
        boxes = np.zeros((len(self.masks), 4), np.int64)
        for box, mask in zip(boxes, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    def index_mask(self) -> np.ndarray:
        """(H, W) uint8: 0 for the background, else 1 + the digit."""
        return ((1 + self.digits)[:, None, None] * self.masks).sum(axis=0, dtype=np.uint8)


class SceneGenerator:
    """Draws scenes. Each follows from seed, split and index alone; scenes of train and val share no digit's image.

    Args:
        seed: of all random numbers, and of which digits are held out for val.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        train, val = stratified_split(load_digits()[1], val_fraction=0.2, seed=seed)
        self._digits = {
            split: [(np.asarray(open_image(source))[..., 0], label) for source, label in samples]
            for split, samples in (("train", train), ("val", val))
        }

    def scene(self, split: str, index: int) -> Scene:
        """Scene number ``index`` of "train" or "val"."""
        rng = np.random.default_rng(derived_seed(self.seed, list(self._digits).index(split), index))
        height, width = rng.integers(*SIDES, 2).tolist()
        ground = _color(rng, lambda luminance: 0.1 < luminance < 0.9, (0.0, 0.5))
        canvas = _clutter(rng, _texture(rng, height, width, ground), ground)
        placed: list[_Digit] = []
        number = 0 if rng.random() < _EMPTY else rng.integers(1, MAX_DIGITS + 1)
        low, high = np.log(DIGIT_HEIGHTS)
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
    """A digit in a scene: its visible mask, the area of all of it, and its top, left, height and width."""

    digit: int
    color: np.ndarray
    mask: np.ndarray
    area: int
    window: tuple[int, int, int, int]


def _enlarged(rng: np.random.Generator, pixels: np.ndarray, size: float) -> np.ndarray:
    """Coverage by ink, 0 to 1, of a digit ``size`` pixels high and slightly turned, without empty margins."""
    scale = size / 8
    padded = Image.fromarray(np.pad(pixels, 2))
    side = max(round(12 * scale), 12)
    # Turned while it is large, so that small digits lose no detail.
    large = padded.resize((96, 96), Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    values = np.asarray(turned.resize((side, side), Image.Resampling.LANCZOS), np.float64)
    ink = ((values - _INK) / (96 / min(scale, 4)) + 0.5).clip(0, 1)
    rows, columns = np.flatnonzero((ink > 0.5).any(axis=1)), np.flatnonzero((ink > 0.5).any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, shape: np.ndarray, placed: list[_Digit], height: int, width: int
) -> tuple[int, int] | None:
    """Top and left at which a digit leaves the others legible; None if twenty draws give no such place."""
    free_height, free_width = height - shape.shape[0], width - shape.shape[1]
    if min(free_height, free_width) < 0:
        return None
    for _ in range(20):
        top, left = int(rng.integers(free_height + 1)), int(rng.integers(free_width + 1))
        if all(_is_legible(other, shape, top, left) for other in placed):
            return top, left
    return None


def _is_legible(other: _Digit, shape: np.ndarray, top: int, left: int) -> bool:
    """Whether a digit of this shape, drawn here, leaves enough of another."""
    height, width = shape.shape
    other_top, other_left, other_height, other_width = other.window
    rows = min(top + height, other_top + other_height) - max(top, other_top)
    columns = min(left + width, other_left + other_width) - max(left, other_left)
    if min(rows, columns) <= 0:
        return True
    hidden = (other.mask[top : top + height, left : left + width] & shape).sum()
    return (
        rows * columns <= MAX_OVERLAP * min(height * width, other_height * other_width)
        and other.mask.sum() - hidden >= MIN_VISIBLE * other.area
    )


def _digit_color(rng: np.random.Generator, ground: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """A colour that stands out from the ground: of five, the one that differs most from those of other digits."""
    middle = _luminance(ground)
    drawn = [_color(rng, lambda value: abs(value - middle) > DIGIT_CONTRAST, (0.5, 1.0)) for _ in range(5)]
    return max(drawn, key=lambda color: min((float(np.abs(color - other).sum()) for other in others), default=0))


def _luminance(color: np.ndarray) -> float:
    return float(color @ (0.299, 0.587, 0.114))


def _color(rng: np.random.Generator, fits: Callable[[float], bool], saturation: tuple[float, float]) -> np.ndarray:
    """A random colour, 0 to 1, whose luminance fits."""
    while True:
        hue, lightness, amount = rng.random(), rng.uniform(0.1, 0.95), rng.uniform(*saturation)
        color = np.array(colorsys.hls_to_rgb(hue, lightness, amount))
        if fits(_luminance(color)):
            return color


def _texture(rng: np.random.Generator, height: int, width: int, ground: np.ndarray) -> np.ndarray:
    """(H, W, 3) around a colour: soft patches, a slope of light, and sometimes stripes."""
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
    """Strokes and shapes that are no digits over a canvas, in colours nearer to the ground than those of digits."""
    height, width = canvas.shape[:2]
    middle = _luminance(ground)
    for _ in range(rng.integers(0, 7)):
        color = _color(rng, lambda value: 0.06 < abs(value - middle) < CLUTTER_CONTRAST, (0.2, 0.9))
        layer = Image.new("L", (2 * width, 2 * height))
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
        cover = np.asarray(layer.resize((width, height), Image.Resampling.BOX)) / 255
        canvas = _blend(canvas, cover, color)
    return canvas


def _shaded(rng: np.random.Generator, color: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) of a colour in uneven light."""
    rows = np.linspace(-1, 1, height)[:, None, None]
    columns = np.linspace(-1, 1, width)[:, None]
    return color + rng.uniform(-0.05, 0.05) * rows + rng.uniform(-0.05, 0.05) * columns


def _blend(canvas: np.ndarray, cover: np.ndarray, color: np.ndarray) -> np.ndarray:
    """``color`` over ``canvas`` where ``cover``, from 0 to 1, says so."""
    return canvas + cover[..., None] * (color - canvas)


def write_scenes(
    folder: str | Path, task: str = "detect", num_train: int = 1000, num_val: int = 200, seed: int = 0
) -> Path:
    """Write scenes as data for a task; a folder that holds the same ones already is left as it is.

    For "detect" it has COCO's layout, with masks as RLE, and category ``10 * digit + 1``. For "segment", images, and
    masks whose values are 0 for the background and 1 + the digit. Whatever interrupts the writing, the folder is there
    with all of its files or not at all.

    Args:
        folder: to write.
        task: "detect" or "segment".
        num_train, num_val: scenes of each split.
        seed: of the scenes, which are the same for both tasks.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown task, no scenes, or a folder with other content.
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
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write = _write_detection if task == "detect" else _write_segmentation
        generator = SceneGenerator(seed)
        for split, number in (("train", num_train), ("val", num_val)):
            workers = min(num_cores(), number // _SCENES_PER_WORKER, 8)
            scenes: Iterable[Scene] = DataLoader(
                _Scenes(generator, split, number),
                batch_size=None,
                num_workers=workers if workers > 1 else 0,
                worker_init_fn=ignore_interrupts,
            )
            write(temporary, split, console.progress(scenes, total=number, desc=f"Drawing {split}", unit="scene"))
        if task == "segment":
            lines = [
                f"{name}: {red} {green} {blue}\n" for name, (red, green, blue) in zip(_CLASSES, _COLORS, strict=True)
            ]
            (temporary / "classes.txt").write_text("".join(lines), encoding="utf-8")
        (temporary / SETTINGS_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


class _Scenes(Dataset[Scene]):
    """The first ``number`` scenes of a split."""

    def __init__(self, generator: SceneGenerator, split: str, number: int) -> None:
        self.generator = generator
        self.split = split
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Scene:
        return self.generator.scene(self.split, index)


def _settings_of(folder: Path) -> Any:
    try:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_segmentation(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    images, masks = root / split / "images", root / split / "masks"
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(images / f"{index:05}.jpg", quality=_JPEG_QUALITY)
        mask = Image.fromarray(scene.index_mask()).convert("P")
        mask.putpalette([value for color in _COLORS for value in color])
        mask.save(masks / f"{index:05}.png")


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
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 10 * digit + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": [height, width],
                        "counts": encode(np.asfortranarray(mask, np.uint8))["counts"].decode(),
                    },
                }
            )
    categories = [{"id": 10 * digit + 1, "name": name} for digit, name in enumerate(DIGIT_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
