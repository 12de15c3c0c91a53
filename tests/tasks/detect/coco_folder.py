"""A small data set in COCO's layout without a fault, for tests to change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Content = dict[str, Any]

SIZES = {3: (60, 40), 13: (50, 70), 23: (30, 30)}  # width and height by image id
CATEGORIES = {18: "dog", 1: "person"}


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> Content:
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    fields = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": width * height}
    return {**fields, "iscrowd": 0, "segmentation": [corners], **more}


def content(split: str) -> Content:
    """Two objects in the first image, one in the second and none in the third."""
    return {
        "images": [
            {"id": number, "file_name": f"{split}_{number}.png", "width": width, "height": height}
            for number, (width, height) in SIZES.items()
        ],
        "annotations": [
            annotation(7, 3, 18, [10, 20, 20, 10]),
            annotation(5, 13, 1, [0, 0, 50, 30]),
            annotation(9, 3, 1, [40, 5, 10, 15]),
        ],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }


def write_coco(root: Path, change: Callable[[Content], object] = lambda train: None) -> Path:
    """Write train and val to ``root``, the annotations of train after ``change``."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for number, (width, height) in SIZES.items():
            noise = np.random.default_rng([number, split == "val"]).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"{split}2017" / f"{split}_{number}.png")
        made = content(split)
        if split == "train":
            change(made)
        annotation_file(root, split).write_text(json.dumps(made))
    return root


def annotation_file(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"
