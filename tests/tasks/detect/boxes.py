"""Data for detection, drawn: boxes of two colours on grey, in COCO's layout, with ids that have gaps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask

CATEGORIES = {7: "red", 3: "blue"}
PAINT = {7: (210, 40, 30), 3: (30, 60, 220)}


def draw_boxes(root: Path, num_train: int = 12, num_val: int = 5, masks: bool = True) -> Path:
    """Images of several shapes with one or two objects each, the first of a split with none; masks as RLE.

    The third of a split has a crowd region too. Annotations begin with id 0.
    """
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", num_train), ("val", num_val)):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(number):
            rng = np.random.default_rng([index, split == "val"])
            height, width = ((48, 64), (64, 48), (40, 40), (96, 40))[index % 4]
            pixels = np.full((height, width, 3), 120, np.uint8)
            name = f"{index}.png"
            images.append({"id": 100 + index, "file_name": name, "width": width, "height": height})
            for category in (7, 3)[: 1 + index % 2] if index else ():
                side = int(rng.integers(14, 24))
                left, top = int(rng.integers(width - side)), int(rng.integers(height - side))
                area = np.zeros((height, width), np.uint8)
                area[top : top + side, left : left + side] = 1
                pixels[area == 1] = PAINT[category]
                annotations.append(_annotation(len(annotations), 100 + index, category, area, 0, masks))
            if index == 2:
                area = np.zeros((height, width), np.uint8)
                area[:9, :12] = 1
                annotations.append(_annotation(len(annotations), 100 + index, 3, area, 1, masks))
            noise = rng.integers(-9, 10, pixels.shape)
            Image.fromarray((pixels + noise).astype(np.uint8)).save(root / split / name)
        categories = [{"id": number, "name": label} for number, label in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _annotation(number: int, image: int, category: int, area: np.ndarray, crowd: int, masks: bool) -> dict[str, Any]:
    rle = mask.encode(np.asfortranarray(area))
    fields = {"id": number, "image_id": image, "category_id": category, "iscrowd": crowd}
    fields |= {"bbox": mask.toBbox(rle).tolist(), "area": int(area.sum())}
    if masks:
        fields["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return fields
