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
"""Predictions that are kept to be drawn."""


@dataclass(frozen=True)
class Evaluation:
    """What a segmenter made of images with masks.

    Attributes:
        scores: of all of them.
        kept: samples from all over the images, with the predictions of their pixels.
        data_classes: what the masks mean.
        images_per_second: from pixels to labels.
    """

    scores: SegmentationScores
    kept: list[tuple[SegmentationSample, Segmentation]]
    data_classes: MaskClasses
    images_per_second: float


def evaluate(
    predictor: SegmentPredictor,
    samples: Sequence[SegmentationSample],
    data_classes: MaskClasses,
    views: Views | None = None,
    masks_folder: Path | None = None,
) -> Evaluation:
    """Run ``predictor`` over images, and compare with their masks at the masks' own sizes.

    Args:
        predictor: what to evaluate.
        samples: images and masks.
        data_classes: what the masks mean; its classes are those of the predictor, in any order.
        views: how the images are looked at.
        masks_folder: to write the predicted masks into, with the values of the data's own masks.

    Raises:
        ValueError: the predictor has not the classes of the data; an image or mask that cannot be used.
    """
    to_data = _class_order(predictor, data_classes)
    views = views or Views()
    dataset = SegmentationDataset(samples, data_classes, SegmentationEvalTransform())
    num_classes = len(data_classes.names)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
    chosen = set(np.linspace(0, len(samples) - 1, min(NUM_KEPT, len(samples))).round().astype(int).tolist())
    kept, seconds = [], 0.0
    for index, sample in enumerate(progress(samples, desc="Evaluating", unit="image")):
        image, labels = dataset.read(index)
        start = time.perf_counter()
        predicted = to_data[predictor.label(image, views)]
        seconds += time.perf_counter() - start
        confusion += count_confusion(torch.from_numpy(predicted), labels, num_classes, data_classes.ignore_index)
        found = Segmentation(predicted, data_classes)
        if masks_folder is not None:
            path = masks_folder / Path(sample.name).with_suffix(".png")
            open_folder(path.parent)
            found.index_image().save(path)
        if index in chosen:
            kept.append((sample, found))
    return Evaluation(
        SegmentationScores(data_classes.names, confusion, len(samples)), kept, data_classes, len(samples) / seconds
    )


def _class_order(predictor: SegmentPredictor, data_classes: MaskClasses) -> np.ndarray:
    """(C,) labels of the data by label of the predictor."""
    names = predictor.mask_classes.names
    if set(names) != set(data_classes.names):
        missing = [name for name in names if name not in data_classes.names]
        foreign = [name for name in data_classes.names if name not in names]
        raise ValueError(
            f"the classes of the data are not those of the model: it has {missing[:3] or 'all of them'} besides, "
            f"and lacks {foreign[:3] or 'none'}"
        )
    return np.array([data_classes.names.index(name) for name in names], np.int16)
