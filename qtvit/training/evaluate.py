"""Scores of a classifier on labelled images."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix
from tqdm import tqdm

from qtvit.checkpoints import ModelInfo
from qtvit.data import DIGITS, ImageDataset, load_labelled_images, read_split
from qtvit.data.classification import Sample, find_val_folder, held_out_part
from qtvit.deploy import Predictor


@dataclass(frozen=True)
class Evaluation:
    """What a classifier said of N labelled images.

    Attributes:
        classes: C names.
        targets: (N,) labels.
        probabilities: (N, C) softmax outputs.
        images_per_second: speed of the forward pass alone, in the batches evaluated.
    """

    classes: Sequence[str]
    targets: Tensor
    probabilities: Tensor
    images_per_second: float

    def accuracy(self, top_k: int = 1) -> float:
        """Percentage of images whose label is among the ``top_k`` most probable classes."""
        num_classes = len(self.classes)
        if top_k >= num_classes:
            return 100.0
        correct = multiclass_accuracy(self.probabilities, self.targets, num_classes, average="micro", top_k=top_k)
        return 100 * float(correct)

    def confusion(self) -> Tensor:
        """(C, C) counts, true class by predicted class."""
        return multiclass_confusion_matrix(self.probabilities, self.targets, len(self.classes))

    def metrics(self) -> dict[str, float]:
        """Top-1 and top-5 in percent, and the number of images."""
        return {
            "top1": round(self.accuracy(1), 4),
            "top5": round(self.accuracy(5), 4),
            "num_images": len(self.targets),
        }


def held_out_samples(data: str, info: ModelInfo) -> tuple[list[Sample], str]:
    """The labelled images of ``data`` to score a model on, and in words which they are.

    Of a folder with val/CLASS (or valid, validation, test) those; of a folder of CLASS alone all images, unless the
    model was trained on a part of these very images: then the part that was held out. The same goes for "digits".

    Raises:
        FileNotFoundError, ValueError: as `qtvit.data.load_labelled_images`, or classes that the model does not have.
    """
    if data == DIGITS:
        if info.split.get("data") != DIGITS:
            raise ValueError(f"the digits are not what {info.model} was trained on ({', '.join(info.classes[:5])}, …)")
        digits = load_labelled_images(data, val_fraction=info.split["val_fraction"], seed=info.split["seed"])
        return digits.val, "the digits held out from training"
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"{data}: no such folder")
    folder = find_val_folder(root) or root
    samples = read_split(folder, info.classes)
    held_out = held_out_part(samples, folder, info.split)
    if held_out is not None:
        return held_out, f"the part of {folder} held out from training ({len(samples)} images in all)"
    return samples, f"all images in {folder}"


@torch.inference_mode()
def evaluate(
    predictor: Predictor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Run ``predictor`` over all ``samples``, with its own preprocessing."""
    dataset = ImageDataset(samples, predictor.preprocess.transform())
    batches: Iterable[tuple[Tensor, Tensor]] = DataLoader(dataset, batch_size, num_workers=num_workers)
    probabilities, targets, seconds = [], [], 0.0
    for images, labels in tqdm(
        batches, desc="Evaluating", unit="batch", leave=False, disable=None if progress else True
    ):
        images = images.to(predictor.device)
        start = time.perf_counter()
        logits = predictor.model(images)
        probabilities.append(logits.float().softmax(-1).cpu())
        seconds += time.perf_counter() - start
        targets.append(labels)
    return Evaluation(predictor.classes, torch.cat(targets), torch.cat(probabilities), len(dataset) / seconds)
