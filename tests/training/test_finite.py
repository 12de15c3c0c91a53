"""Training stops at the first number that is not finite, says where it comes from, and steps no further."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from qtvit.data import EvalTransform
from qtvit.data.sampling import EpochBatches
from qtvit.models import Architecture, QTViT
from qtvit.tasks.classify.data import ImageDataset, load_labelled_images
from qtvit.tasks.classify.train import Classifier
from qtvit.training.finite import BAD_BATCH, StopAtNonFinite
from qtvit.training.run import build_trainer, clean_up
from qtvit_cli import main

from .fit import NUM_CLASSES, Batch, configured, fit, fit_with, random_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")

NUM_BATCHES, BATCH_SIZE = 4, 4
NAMES = [f"{index}.png" for index in range(NUM_BATCHES * BATCH_SIZE)]
LAYER = "stages.1.1.local.depth_conv.conv"


@pytest.fixture
def network(tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]) -> QTViT:
    return randomize(QTViT(tiny_architectures["nano"], num_classes=NUM_CLASSES, img_size=16), 0)


class InfiniteGradient(torch.autograd.Function):
    """x, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.inf)


class Weights(Callback):
    """The weights after each step that was taken."""

    def __init__(self) -> None:
        self.after: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append([parameter.detach().clone() for parameter in pl_module.model.parameters()])


def stopping(run: Path) -> StopAtNonFinite:
    return StopAtNonFinite(run, EpochBatches(len(NAMES), BATCH_SIZE, seed=0), NAMES)


def spoil_pixels(model: QTViT, batches: list[Batch]) -> None:
    batches[2][0][1, 2, 3, 4] = torch.nan


def spoil_weights(model: QTViT, batches: list[Batch]) -> None:
    model.get_submodule(LAYER).weight.data[3] = torch.nan


def overflow(model: QTViT, batches: list[Batch]) -> None:
    model.get_submodule(LAYER).weight.data.fill_(3e38)


def infinite_gradient(model: QTViT, batches: list[Batch]) -> None:
    calls: list[int] = []

    def third(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(1)
        return InfiniteGradient.apply(output) if len(calls) == 3 else None

    model.get_submodule(LAYER).register_forward_hook(third)


@pytest.mark.parametrize(
    ("spoil", "batch", "message", "layer"),
    [
        (spoil_pixels, 2, "the loss is nan", "stages.0.0.conv"),
        (spoil_weights, 0, "the loss is nan", f"{LAYER}.weight (its values)"),
        (overflow, 0, "the loss is nan", LAYER),
        (infinite_gradient, 2, "a gradient is not finite", LAYER),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_layer_the_images_and_no_step(
    spoil: Callable[[QTViT, list[Batch]], None],
    batch: int,
    message: str,
    layer: str,
    accumulate: int,
    network: QTViT,
    tmp_path: Path,
) -> None:
    batches, weights = random_batches(NUM_BATCHES, BATCH_SIZE), Weights()
    spoil(network, batches)
    task = Classifier(network, NUM_CLASSES, configured(accumulate=accumulate))
    stop = stopping(tmp_path)
    with pytest.raises(FloatingPointError) as error:
        fit(task, batches, tmp_path, weights, stop)
    bad = [batch]
    if spoil is infinite_gradient and accumulate == 2:  # the gradients of both are added up
        bad = [batch, batch + 1]
    assert f"{message} in epoch 1, batch {bad[-1] + 1}; first bad layer: {layer};" in str(error.value)
    record = json.loads((tmp_path / BAD_BATCH.format("")).read_text())
    indices = [index for number in bad for _, index, _ in stop.batches.keys(number)]
    assert record["indices"] == indices
    assert record["images"] == [NAMES[index] for index in indices]
    assert record["batches"] == [number + 1 for number in bad]
    assert (record["layer"], record["epoch"], record["step"]) == (layer, 1, batch // accumulate)
    assert len(weights.after) == bad[-1] + 1
    for now, before in zip(network.parameters(), weights.after[-1], strict=True):
        assert torch.equal(now.nan_to_num(7), before.nan_to_num(7))


def test_without_a_bad_layer_it_is_the_loss(network: QTViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtvit.tasks.classify.train.classification_loss", lambda logits, *_: logits.sum() * torch.inf)
    with pytest.raises(FloatingPointError, match="first bad layer: the loss itself"):
        fit(Classifier(network, NUM_CLASSES, configured()), random_batches(1, BATCH_SIZE), tmp_path, stopping(tmp_path))


class Lowering(Callback):
    """The scale of the loss scaler at each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("good", [0, 2])
def test_a_scaler_backs_off_until_there_is_nothing_left_to_lower(good: int, network: QTViT, tmp_path: Path) -> None:
    calls: list[int] = []

    def after_some(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(1)
        return InfiniteGradient.apply(output) if len(calls) > good else None

    network.get_submodule(LAYER).register_forward_hook(after_some)
    task, weights, lowering = Classifier(network, NUM_CLASSES, configured(epochs=4)), Weights(), Lowering()
    trainer = build_trainer(task.config, torch.device("cpu"), tmp_path, [weights, lowering, stopping(tmp_path)])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.raises(FloatingPointError, match=f"a gradient is not finite .* first bad layer: {LAYER};"):
        fit_with(trainer, task, random_batches(NUM_BATCHES, BATCH_SIZE))
    assert lowering.scales == [4.0] * good + [4.0, 2.0, 1.0]
    assert task.num_backoffs == 2
    unchanged = [all(map(torch.equal, *pair)) for pair in zip(weights.after, weights.after[1:], strict=False)]
    assert unchanged == [False] * good + [True, True]
    saved: dict[str, Any] = {}
    task.on_save_checkpoint(saved)
    task.num_backoffs = 0
    task.on_load_checkpoint(saved)
    assert task.num_backoffs == 2


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_back_offs_are_logged_with_a_scaler(
    precision: Any, network: QTViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Classifier(network, NUM_CLASSES, configured(epochs=1))
    task.config.precision = precision
    task.num_backoffs = 3
    trainer = build_trainer(configured(epochs=1), torch.device("cpu"), tmp_path, [])
    batches = random_batches(1, BATCH_SIZE)
    fit_with(trainer, task, batches, batches)
    assert trainer.logged_metrics.get("train/backoffs") == (3 if precision == "16-mixed" else None)


def test_at_the_command_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = str(load_labelled_images(str(photos)).train[5][0])
    read: list[str] = []
    item = ImageDataset.__getitem__

    def spoilt(self: ImageDataset, index: int) -> tuple[Tensor, int]:
        image, label = item(self, index)
        read.append(str(self.samples[index][0]))
        return image * torch.nan if read[-1] == bad else image, label

    monkeypatch.setattr(ImageDataset, "__getitem__", spoilt)
    argv = f"train classify --model qtvit_nano --img-size 16 --epochs 1 --batch-size 8 --num-workers 0 --data {photos}"
    assert main([*argv.split(), "--output", "run", "--bn-images", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qtvit: error: the loss is nan in epoch 1, batch ")
    assert error.count("\n") == 1
    assert "listed in run/bad_batch.json" in error
    record = json.loads((tmp_path / "run" / BAD_BATCH.format("")).read_text())
    start = read.index(bad) // 8 * 8
    assert record["images"] == read[start : start + 8]
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_in_the_evaluation(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EvalTransform, "forward", lambda self, image: torch.full((3, *self.size), math.nan))
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 8 --epochs 1 --batch-size 8 --num-workers 0"
    assert main([*argv.split(), "--output", str(tmp_path / "run")]) == 2
    assert "the held-out loss of the trained weights is nan" in capsys.readouterr().err


def test_the_record_of_any_process_outlives_the_error(tmp_path: Path) -> None:
    for name, kept in (("bad_batch-1.json", True), ("bad_batch.json", True), ("config.yaml", False)):
        run = tmp_path / name.partition(".")[0]
        run.mkdir()
        (run / name).touch()
        with pytest.raises(FloatingPointError), clean_up(run):
            raise FloatingPointError
        assert run.exists() == kept
