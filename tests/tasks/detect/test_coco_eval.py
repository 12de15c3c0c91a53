"""Average precision: by hand, and against pycocotools on COCO's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from qtvit.tasks.detect.coco_eval import FIGURES, GroundTruth
from qtvit.tasks.detect.data import load_held_out

from .coco_folder import annotation, annotation_file, write_coco

NAMES = {1: "person", 18: "dog"}


def truth(root: Path, annotations: list[dict[str, Any]]) -> GroundTruth:
    write_coco(root)
    path = annotation_file(root, "val")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": annotations}))
    return GroundTruth(load_held_out(str(root), NAMES), NAMES)


def found(image: int, category: int, score: float, box: list[float], size: tuple[int, int] = (40, 60)) -> Any:
    left, top, width, height = (round(value) for value in box)
    pixels = np.zeros(size, np.uint8, order="F")
    pixels[top : top + height, left : left + width] = 1
    rle = mask.encode(pixels)
    return {"image_id": image, "category_id": category, "score": score, "bbox": box, "segmentation": rle}


def test_by_hand(tmp_path: Path) -> None:
    people = [annotation(0, 3, 1, [0, 0, 10, 10]), annotation(1, 3, 1, [30, 0, 10, 20])]
    scores = truth(tmp_path, people).score(
        [
            found(3, 1, 0.9, [0, 0, 10, 10]),
            found(3, 1, 0.8, [0, 25, 10, 10]),  # nothing there
            found(3, 1, 0.7, [30, 0, 10, 13]),  # IoU 0.65, so right at four of ten thresholds
            found(3, 18, 0.9, [30, 0, 10, 20]),  # of a category that has no objects
        ],
        has_masks=True,
    )
    half, both = 51 / 101, (51 + 50 * 2 / 3) / 101  # of the recalls 0, 0.01, …, 1: up to 0.5, and beyond at 2/3
    for kind in ("box", "mask"):
        figures = scores[kind].figures
        assert figures["ap50"] == pytest.approx(100 * both, abs=1e-3)
        assert figures["ap75"] == pytest.approx(100 * half, abs=1e-3)
        assert figures["ap"] == pytest.approx(100 * (0.4 * both + 0.6 * half), abs=1e-3)
        assert figures["ar1"] == 50
        assert figures["ar100"] == pytest.approx(100 * (0.4 * 1 + 0.6 * 0.5))
        assert figures["ap_small"] == figures["ap"]
        assert figures["ap_large"] is None
        person, dog = scores[kind].per_category
        assert (person.label, person.category_id, person.num_objects, person.ap) == ("person", 1, 2, figures["ap"])
        assert (dog.label, dog.category_id, dog.num_objects, dog.ap) == ("dog", 18, 0, None)


def test_a_crowd_is_neither_missed_nor_found(tmp_path: Path) -> None:
    objects = [annotation(4, 3, 18, [0, 0, 30, 30], iscrowd=1), annotation(5, 3, 18, [40, 0, 10, 10])]
    results = [found(3, 18, 0.9, [2, 2, 10, 10]), found(3, 18, 0.8, [40, 0, 10, 10])]
    scores = truth(tmp_path, objects).score(results, has_masks=True)
    assert scores["box"].figures["ap"] == scores["mask"].figures["ap"] == pytest.approx(100)
    assert scores["box"].per_category[1].num_objects == 1


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    person = truth(tmp_path / "one", [annotation(5, 13, 1, [0, 0, 50, 30])])
    assert person.score([], has_masks=True)["mask"].figures["ap"] == 0
    assert set(person.score([], has_masks=False)) == {"box"}
    nothing = truth(tmp_path / "none", [annotation(5, 13, 1, [0, 0, 50, 30], iscrowd=1)])
    assert nothing.score([found(3, 1, 0.9, [0, 0, 9, 9])], has_masks=True)["box"].figures == dict.fromkeys(FIGURES)


def test_boxes_alone_where_an_object_has_no_mask(tmp_path: Path) -> None:
    bare = annotation(5, 13, 1, [0, 0, 50, 30])
    del bare["segmentation"]
    scores = truth(tmp_path, [annotation(4, 3, 1, [0, 0, 9, 9]), bare]).score([], has_masks=True)
    assert set(scores) == {"box"}
