"""COCO's average precision of boxes and masks, computed by pycocotools.

Shapes: T IoU thresholds (0.5, 0.55, … 0.95), R recalls (0, 0.01, … 1), K categories.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .data import DetectionSamples
from .predict import Result

FIGURES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
"""COCO's twelve figures, in the order of pycocotools."""
KINDS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}
"""What is compared: pycocotools' name of it, and the key of a `Result` that holds it."""


@dataclass(frozen=True)
class CategoryScores:
    """One category as a row of a table; scores in percent, None for a category without objects."""

    category_id: int  # in the annotation file
    label: str
    num_objects: int  # objects to find, not counting crowd regions
    ap: float | None  # average precision over all IoU thresholds
    ap50: float | None  # at an IoU of 0.5
    ap75: float | None
    ar100: float | None  # recall with at most 100 boxes per image, averaged over the IoU thresholds


@dataclass(frozen=True)
class CocoScores:
    """The result of COCO's evaluation of boxes or of masks."""

    figures: dict[str, float | None]  # the twelve `FIGURES` in percent; None where there is nothing to find
    per_category: list[CategoryScores]  # in the order of the classes
    precision: np.ndarray  # (T, R, K), for all sizes and at most 100 boxes per image; -1 in categories without objects
    recalls: np.ndarray  # (R,)


class GroundTruth:
    """The objects to find in some images, as pycocotools takes them.

    It is built from the samples, not from their file, because the file may lack areas and crowd flags, and because
    pycocotools takes a match with an annotation of id 0 for no match.

    Args:
        samples: images with their objects.
        categories: names by id.
    """

    def __init__(self, samples: DetectionSamples, categories: Mapping[int, str]) -> None:
        self.categories = dict(categories)
        self.images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        category_ids = list(categories)
        self.counts = dict.fromkeys(category_ids, 0)
        for sample in samples:
            self.images.append({"id": sample.image_id, "width": sample.width, "height": sample.height})
            for i, (left, top, right, bottom) in enumerate(sample.boxes.tolist()):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": category_ids[sample.labels[i] - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(sample.areas[i]),
                    "iscrowd": int(sample.crowd[i]),
                }
                if sample.masks is not None:
                    annotation["segmentation"] = sample.masks[i]
                annotations.append(annotation)
                self.counts[annotation["category_id"]] += not annotation["iscrowd"]
        self.kinds = ("box", "mask") if samples.has_masks else ("box",)
        self._coco = self._index(annotations)

    def score(self, results: Sequence[Result], has_masks: bool) -> dict[str, CocoScores]:
        """The scores of "box" and, if both results and objects have masks, of "mask"."""
        return {kind: self._score(kind, results) for kind in self.kinds if kind == "box" or has_masks}

    def _score(self, kind: str, results: Sequence[Result]) -> CocoScores:
        iou_type, key = KINDS[kind]
        found = [
            {**{name: result[name] for name in ("image_id", "category_id", "score", key)}, "id": i, "iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ]
        for result in found:
            result["area"] = result[key][2] * result[key][3] if kind == "box" else float(mask.area(result[key]))
        evaluation = COCOeval(self._coco, self._index(found), iou_type)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        in_order = [evaluation.params.catIds.index(category) for category in self.categories]
        precision = evaluation.eval["precision"][:, :, in_order, 0, -1]  # all sizes, at most 100 boxes
        recall = evaluation.eval["recall"][:, in_order, 0, -1]
        per_category = []
        for k, (category, name) in enumerate(self.categories.items()):
            scores = (_mean(values[..., k]) for values in (precision, precision[0], precision[5], recall))
            per_category.append(CategoryScores(category, name, self.counts[category], *scores))
        figures = dict(zip(FIGURES, map(_percent, evaluation.stats), strict=True))
        return CocoScores(figures, per_category, precision, evaluation.params.recThrs)

    def _index(self, annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        coco.dataset = {"images": self.images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _percent(value: float) -> float | None:
    """A score in percent; None for COCO's -1, which means that there is nothing to find."""
    return None if value < 0 else round(100 * float(value), 4)


def _mean(values: np.ndarray) -> float | None:
    present = values[values > -1]
    return _percent(present.mean()) if present.size else None
