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
from qtvit.data.classification import VAL_FOLDERS, Sample
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


def held_out_samples(data: str, info: ModelInfo) -> list[Sample]:
    """The labelled images of ``data`` that the model has not been trained on.

    Of a folder with val/CLASS (or valid, validation, test) those; of a folder of CLASS alone all images, unless the
    model was trained on a part of this very folder: then the part that was held out. The same goes for "digits".

    Raises:
        FileNotFoundError, ValueError: as `qtvit.data.load_labelled_images`, or classes that the model does not have.
    """
    root = Path(data)
    if data == info.split.get("data") or (data != DIGITS and str(root.resolve()) == info.split.get("data")):
        images = load_labelled_images(data, val_fraction=info.split["val_fraction"], seed=info.split["seed"])
        if list(images.classes) == list(info.classes):
            return images.val
    if data == DIGITS:
        raise ValueError(f"the digits are not what {info.model} was trained on ({', '.join(info.classes[:5])}, …)")
    if not root.is_dir():
        raise FileNotFoundError(f"{data}: no such folder")
    folder = next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), root)
    return read_split(folder, info.classes)


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
