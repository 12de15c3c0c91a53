"""Evaluating a detector on labelled images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from qtvit.console import progress

from .coco_eval import CocoScores, GroundTruth
from .data import DetectionDataset, DetectionSamples, collate
from .predict import DetectPredictor, Result, coco_results


@dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector found in labelled images."""

    classes: Sequence[str]  # names, in the order of the labels
    category_ids: Sequence[int]  # ids of the classes
    results: list[Result]  # everything that was found, in COCO's submission format
    scores: dict[str, CocoScores]  # by "box" and "mask"
    num_images: int
    images_per_second: float  # of the detector alone, one image at a time

    def metrics(self) -> dict[str, float | None]:
        """All figures: box_ap, box_ap50, …, mask_ap, …."""
        return {f"{kind}_{name}": value for kind, s in self.scores.items() for name, value in s.figures.items()}


@torch.inference_mode()
def evaluate_detector(
    predictor: DetectPredictor, samples: DetectionSamples, truth: GroundTruth, *, num_workers: int = 0
) -> DetectionEvaluation:
    """Run ``predictor`` over all ``samples`` and compare what it finds with ``truth``."""
    loader: Any = DataLoader(DetectionDataset(samples), batch_size=1, collate_fn=collate, num_workers=num_workers)
    results: list[Result] = []
    seconds = 0.0
    for [image], [target] in progress(loader, desc="Evaluating", unit="image"):
        start = time.perf_counter()
        output = {name: tensor.cpu() for name, tensor in predictor.runtime.detect(image).items()}
        seconds += time.perf_counter() - start
        results += coco_results(output, target["image_id"], predictor.category_ids)
    scores, speed = truth.score(results, predictor.has_masks), len(samples) / seconds
    return DetectionEvaluation(predictor.classes, predictor.category_ids, results, scores, len(samples), speed)
