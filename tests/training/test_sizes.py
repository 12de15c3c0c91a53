"""The images of each training batch, as they come out of the loader: their size, and augmentation that is off."""

from pathlib import Path
from typing import Any

import lightning
import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from qtvit.data.sampling import derived_seed
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.tasks.classify.train import Classifier
from qtvit.tasks.classify.transforms import TrainTransform
from qtvit.training.callbacks import EstimateBatchNorm
from qtvit.training.job import train
from qtvit.training.options import make_config
from qtvit_cli import main

OPTIONS: dict[str, Any] = {
    "model": "qtvit_nano",
    "img_size": 16,
    "epochs": 2,
    "batch_size": 4,
    "bn_images": 8,
    "num_workers": 0,
    "augment": {"train_sizes": [8, 12, "12x20"], "auto_augment": "rand-n1-m3-mstd1.0-inc1", "random_erasing": 0.2},
}
SIZES = [(16, 16), (8, 8), (12, 12), (12, 20)]
"""The evaluation's, then those of training."""


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_arrives_in_the_size_that_it_drew(
    workers: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[tuple[int, ...]] = []
    evaluated: list[tuple[int, ...]] = []
    step, score = Classifier.training_step, Classifier.validation_step

    def training_step(self: Classifier, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        arrived.append(tuple(batch[0].shape))
        return step(self, batch, batch_idx)

    def validation_step(self: Classifier, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        evaluated.append(tuple(batch[0].shape[2:]))
        score(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    monkeypatch.setattr(Classifier, "validation_step", validation_step)
    argv = "train classify --model qtvit_nano --img-size 16 --epochs 2 --batch-size 4 --bn-images 0 --seed 3"
    sizes = ["--augment.train-sizes", "[8, 12, 12x20]"]
    assert main([*argv.split(), *sizes, "--data", str(photos), "--num-workers", str(workers)]) == 0
    drawn = [SIZES[1 + derived_seed(3, epoch, batch) % 3] for epoch in range(2) for batch in range(6)]
    assert set(drawn) == set(SIZES[1:])
    assert arrived == [(4, 3, *size) for size in drawn]
    assert set(evaluated) == {(16, 16)}


class Stop(Exception):
    """Before the first step."""


@pytest.mark.parametrize(
    ("off", "sizes", "augments", "erases", "estimates"),
    [
        ({}, SIZES, True, True, True),
        ({"augment": {"train_sizes": []}}, [(16, 16)], True, True, True),
        ({"augment": {"auto_augment": None}}, SIZES, False, True, True),
        ({"augment": {"random_erasing": 0.0}}, SIZES, True, False, True),
        ({"bn_images": 0}, SIZES, True, True, False),
    ],
    ids=["all on", "one size", "no RandAugment", "no erasing", "no estimation"],
)
def test_parts_of_the_data_are_switched_off_alone(
    off: dict[str, Any],
    sizes: list[tuple[int, int]],
    augments: bool,
    erases: bool,
    estimates: bool,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {}

    def fit(self: Any, task: Classifier, loader: DataLoader, *args: Any, **kwargs: Any) -> None:
        found.update(callbacks=self.callbacks, data=loader.dataset, batch=next(iter(loader))[0])
        raise Stop

    monkeypatch.setattr(lightning.Trainer, "fit", fit)
    augment = {**OPTIONS["augment"], **off.get("augment", {})}
    options = {**OPTIONS, **off, "augment": augment}
    with pytest.raises(Stop):
        train(make_config(ClassifyConfig, data=str(photos), **options))
    transforms: list[TrainTransform] = [dataset.transform for dataset in found["data"].datasets]
    steps = [{type(step).__name__ for step in transform.augment.transforms} for transform in transforms]
    assert [transform.augment.transforms[0].size for transform in transforms] == sizes
    assert all(("RandAugment" in step) == augments for step in steps)
    assert all((transform.erase is not None) == erases for transform in transforms)
    assert any(isinstance(callback, EstimateBatchNorm) for callback in found["callbacks"]) == estimates
    assert tuple(found["batch"].shape[2:]) in (sizes[1:] or sizes)
