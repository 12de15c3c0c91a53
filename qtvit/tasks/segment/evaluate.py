"""Evaluating a segmenter on images with masks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qtvit.console import progress
from qtvit.files import open_folder

from .data import SegmentationDataset
from .layout import SegmentationSample
from .masks import MaskClasses
from .predict import Segmentation, SegmentPredictor, Views
from .scores import SegmentationScores, count_confusion
from .transforms import SegmentationEvalTransform

NUM_KEPT = 12
"""Number of predictions that are kept to be drawn."""


@dataclass(frozen=True)
class Evaluation:
    """A segmenter's predictions for images with masks."""

    scores: SegmentationScores
    kept: list[tuple[SegmentationSample, Segmentation]]  # samples spread evenly over the images, with predictions
    data_classes: MaskClasses  # what the masks mean
    images_per_second: float  # from pixels to labels


def evaluate(
    predictor: SegmentPredictor,
    samples: Sequence[SegmentationSample],
    data_classes: MaskClasses,
    views: Views | None = None,
    masks_folder: Path | None = None,
) -> Evaluation:
    """Run ``predictor`` over images, and compare with their masks at the masks' own sizes.

    Args:
        predictor: the model to evaluate.
        samples: images and masks.
        data_classes: what the masks mean; the classes are those of the predictor, in any order.
        views: how the images are presented to the network.
        masks_folder: folder to write the predicted masks to, with the values of the data's own masks.

    Raises:
        ValueError: the predictor has other classes than the data; an image or mask cannot be used.
    """
    names, num_images = data_classes.names, len(samples)
    to_data = _class_order(predictor, names)
    dataset = SegmentationDataset(samples, data_classes, SegmentationEvalTransform())
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)
    chosen = set(np.linspace(0, num_images - 1, min(NUM_KEPT, num_images)).round().astype(int).tolist())
    kept, seconds = [], 0.0
    for index, sample in enumerate(progress(samples, desc="Evaluating", unit="image")):
        image, labels = dataset.read(index)
        start = time.perf_counter()
        predicted = to_data[predictor.label(image, views or Views())]
        seconds += time.perf_counter() - start
        confusion += count_confusion(torch.from_numpy(predicted), labels, len(names), data_classes.ignore_index)
        found = Segmentation(predicted, data_classes)
        if masks_folder is not None:
            path = masks_folder / Path(sample.name).with_suffix(".png")
            open_folder(path.parent)
            found.index_image().save(path)
        if index in chosen:
            kept.append((sample, found))
    return Evaluation(SegmentationScores(names, confusion, num_images), kept, data_classes, num_images / seconds)


def _class_order(predictor: SegmentPredictor, data_names: Sequence[str]) -> np.ndarray:
    """(C,) label in the data of each label of the predictor."""
    names = predictor.mask_classes.names
    if set(names) != set(data_names):
        missing = [name for name in names if name not in data_names]
        foreign = [name for name in data_names if name not in names]
        raise ValueError(
            f"the classes of the data are not those of the model: it has {missing[:3] or 'all of them'} besides, "
            f"and lacks {foreign[:3] or 'none'}"
        )
    return np.array([data_names.index(name) for name in names], np.int16)
