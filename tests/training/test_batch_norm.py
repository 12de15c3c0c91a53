"""BatchNorm statistics estimated before each evaluation, by hand; what is evaluated and saved."""

import copy
import csv
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qtvit.checkpoints import load_model
from qtvit.data.sampling import Key
from qtvit.models import Architecture, QTViT
from qtvit.tasks.classify.train import Classifier
from qtvit.training import job
from qtvit.training.callbacks import LAST, EstimateBatchNorm
from qtvit.training.optim import batch_norms
from qtvit_cli import main

from .fit import NUM_CLASSES, Batch, configured, fit, random_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")


@pytest.fixture
def network(tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]) -> QTViT:
    args: dict[str, Any] = {"num_classes": NUM_CLASSES, "img_size": 16, "drop_path_rate": 0.5, "drop_rate": 0.5}
    return randomize(QTViT(tiny_architectures["nano"], **args), 0)


class Before(Callback):
    """The trained network and its average as they are after the last step, before the evaluation."""

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        self.model = copy.deepcopy(pl_module.model)
        self.average = None if pl_module.ema is None else copy.deepcopy(pl_module.ema.module)


@torch.no_grad()
def averaged(model: nn.Module, batches: list[Batch], frozen: Container[str] = ()) -> dict[str, Tensor]:
    """Means over the batches of each batch's mean and unbiased variance, but for the norms in ``frozen``."""
    model = copy.deepcopy(model).eval()
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            values = inputs[0].transpose(0, 1).flatten(1)
            for key, value in (("running_mean", values.mean(1)), ("running_var", values.var(1, unbiased=True))):
                sums[f"{name}.{key}"] = sums.get(f"{name}.{key}", 0) + value / len(batches)

        return add

    for name, norm in batch_norms(model).items():
        if name not in frozen:
            norm.train()
            norm.register_forward_pre_hook(hook(name))
    for images, _ in batches:
        model(images)
    return sums


def assert_has(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert len(statistics) >= 2
    for name, value in statistics.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def statistics_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "running_" in key or "num_batches" in key}


def assert_equal(ours: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert [key for key, value in want.items() if not torch.equal(value, ours[key])] == []


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_they_are_averages_over_the_batches(decay: float, network: QTViT, tmp_path: Path) -> None:
    config = configured(augment={"mixup": 0.5, "cutmix": 0.5}, ema={"decay": decay, "warmup_steps": 0}, epochs=1)
    task = Classifier(network, NUM_CLASSES, config)
    batches, held_out, before = random_batches(3), random_batches(1, 4), Before()
    scored: list[Tensor] = []
    task.networks[""].register_forward_hook(lambda module, inputs, output: scored.append(output))
    estimate = EstimateBatchNorm(DataLoader(batches[:2], batch_size=None))
    fit(task, batches, tmp_path, before, estimate, held_out=held_out)
    if before.average is None:
        assert_has(task.model, averaged(before.model, batches[:2]))
    else:
        assert task.ema is not None
        assert_has(task.ema.module, averaged(before.average, batches[:2]))
        assert_equal(task.model.state_dict(), statistics_of(before.model.state_dict()))
    for name, value in before.model.named_parameters():
        assert torch.equal(value, task.model.get_parameter(name))
    with torch.no_grad():  # evaluation is with them
        torch.testing.assert_close(task.networks[""].eval()(held_out[0][0]), scored[-1])
    assert {norm.momentum for norm in batch_norms(task).values()} == {0.1}


def test_frozen_norms_keep_theirs(network: QTViT, tmp_path: Path) -> None:
    start = copy.deepcopy(network.state_dict())
    task = Classifier(network, NUM_CLASSES, configured(freeze="stages=1", epochs=1))
    frozen = [name for name, norm in batch_norms(network).items() if norm in task.frozen]
    assert 0 < len(frozen) < len(batch_norms(network))
    batches, before = random_batches(2), Before()
    estimate = EstimateBatchNorm(DataLoader(batches, batch_size=None))
    fit(task, batches, tmp_path, before, estimate, held_out=batches[:1])
    assert_equal(task.model.state_dict(), {f"{name}.running_var": start[f"{name}.running_var"] for name in frozen})
    assert_has(task.model, averaged(before.model, batches, frozen))


TRAIN = (
    "train classify --model qtvit_nano --img-size 16 --epochs 2 --batch-size 8 --num-workers 0 --data {data} "
    "--output run --bn-images 12 --bn-batch-size 5 --augment.train-sizes [8,12] --augment.mixup 1 "
    "--ema.decay 0.5 --ema.warmup-steps 0"
)


def test_norms_stay_frozen_when_they_are_replaced_by_synchronised_ones(network: QTViT) -> None:
    task = Classifier(network, NUM_CLASSES, configured(freeze_bn=True))
    nn.SyncBatchNorm.convert_sync_batchnorm(task)
    norms = [module for module in task.train().model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_the_recipes_subset_and_what_is_saved(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    raw: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []
    keys: list[Key] = []

    class Spy(EstimateBatchNorm):
        def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            loader: Any = self.loader
            assert loader.dataset is trainer.train_dataloader.dataset  # with the same augmentation
            keys.extend(key for batch in loader.batch_sampler for key in batch)
            seen.append([images for images, _ in loader])
            raw.append(copy.deepcopy(pl_module.model.state_dict()))
            super().on_validation_start(trainer, pl_module)

        def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            averages.append(copy.deepcopy(pl_module.ema.module.state_dict()))

    monkeypatch.setattr(job, "EstimateBatchNorm", Spy)
    assert main(TRAIN.format(data=photos).split()) == 0
    assert [[images.shape for images in batches] for batches in seen] == [[(5, 3, 16, 16)] * 2] * 2
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert keys[:10] == keys[10:]
    assert len({index for _, index, _ in keys}) == 10

    best, info = load_model(tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert {"val/top1", "val/top5", "val/loss", "val/raw_top1", "val/raw_top5", "val/raw_loss"} <= rows[0].keys()
    epoch = info.metrics["epoch"]
    assert info.metrics["top1"] == pytest.approx(float(rows[epoch - 1]["val/top1"]))
    assert_equal(best.state_dict(), averages[epoch - 1])
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
    assert_equal(state, {f"model.{name}": value for name, value in raw[-1].items()})
    assert_equal(state, {f"ema.module.{name}": value for name, value in averages[-1].items()})


def test_none_with_no_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "EstimateBatchNorm", None)
    argv = [*TRAIN.format(data=photos).split(), "--bn-images", "0", "--epochs", "1", "--ema.decay", "0"]
    assert main(argv) == 0
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
    assert {int(value) for key, value in state.items() if "num_batches" in key} == {3}  # the running averages
    assert not any(key.startswith("ema") for key in state)
