"""COCO's average precision of boxes and masks, by pycocotools.

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
"""COCO's twelve, in the order of pycocotools."""
KINDS = {"box": "bbox", "mask": "segm"}
"""What is compared, and pycocotools' name of it."""


@dataclass(frozen=True)
class CategoryScores:
    """One category in a table; scores in percent, None for a category without objects.

    Attributes:
        category_id: in the annotation file.
        label: its name.
        num_objects: to be found, crowd regions not counted.
        ap, ap50, ap75: average precision over all IoU thresholds, and at 0.5 and 0.75.
        ar100: the part that is found with at most 100 boxes an image, averaged over the IoU thresholds.
    """

    category_id: int
    label: str
    num_objects: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ar100: float | None


@dataclass(frozen=True)
class CocoScores:
    """What COCO's evaluation says of boxes or of masks.

    Attributes:
        figures: the twelve `FIGURES` in percent; None where there is nothing to find.
        per_category: the scores of every category, in the order of the classes.
        precision: (T, R, K), of all sizes with at most 100 boxes an image; -1 for a category without objects.
        recalls: (R,).
    """

    figures: dict[str, float | None]
    per_category: list[CategoryScores]
    precision: np.ndarray
    recalls: np.ndarray


class GroundTruth:
    """What is to be found in images, as pycocotools takes it.

    It is built from the samples: their file may lack areas and crowd flags, and pycocotools takes an annotation with id
    0 for none.

    Args:
        samples: images with their objects.
        categories: names by id.
    """

    def __init__(self, samples: DetectionSamples, categories: Mapping[int, str]) -> None:
        self.categories = dict(categories)
        self.images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        category_ids = list(categories)
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
        self.kinds = ("box", "mask") if samples.has_masks else ("box",)
        self.counts = dict.fromkeys(category_ids, 0)
        for annotation in annotations:
            self.counts[annotation["category_id"]] += not annotation["iscrowd"]
        self._coco = self._index(annotations)

    def score(self, results: Sequence[Result], has_masks: bool) -> dict[str, CocoScores]:
        """The scores of boxes and, if both results and objects have such, of masks, by "box" and "mask"."""
        return {kind: self._score(kind, results) for kind in self.kinds if kind == "box" or has_masks}

    def _score(self, kind: str, results: Sequence[Result]) -> CocoScores:
        key = {"box": "bbox", "mask": "segmentation"}[kind]
        found = [
            {**{name: result[name] for name in ("image_id", "category_id", "score", key)}, "id": i, "iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ]
        for result in found:
            box = result.get("bbox")
            result["area"] = box[2] * box[3] if box else float(mask.area(result["segmentation"]))
        evaluation = COCOeval(self._coco, self._index(found), KINDS[kind])
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        recall = evaluation.eval["recall"][:, :, 0, -1]
        in_order = [evaluation.params.catIds.index(category) for category in self.categories]
        precision, recall = precision[:, :, in_order], recall[:, in_order]
        return CocoScores(
            dict(zip(FIGURES, map(_percent, evaluation.stats), strict=True)),
            [
                CategoryScores(
                    category,
                    name,
                    self.counts[category],
                    _mean(precision[:, :, k]),
                    _mean(precision[0, :, k]),
                    _mean(precision[5, :, k]),
                    _mean(recall[:, k]),
                )
                for k, (category, name) in enumerate(self.categories.items())
            ],
            precision,
            evaluation.params.recThrs,
        )

    def _index(self, annotations: list[dict[str, Any]]) -> COCO:
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        coco = COCO()
        coco.dataset = {"images": self.images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _percent(value: float) -> float | None:
    """None for COCO's -1."""
    return None if value < 0 else round(100 * float(value), 4)


def _mean(values: np.ndarray) -> float | None:
    present = values[values > -1]
    return _percent(present.mean()) if present.size else None
