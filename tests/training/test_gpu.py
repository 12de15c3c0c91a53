"""Training on GPUs: run with ``pytest -m gpu`` on a machine that has one, or two for synchronised BatchNorm."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtvit.models import Architecture, QTViT
from qtvit.tasks.classify.train import Classifier
from qtvit.training.callbacks import LAST
from qtvit.training.finite import StopAtNonFinite
from qtvit_cli import main

from .fit import NUM_CLASSES, Batch, configured, fit, random_batches
from .test_finite import NAMES, InfiniteGradient, Lowering, stopping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
]
DEVICE = "cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts: for exact resumption
TRAIN = (
    "train classify --model qtvit_nano --img-size 16 --num-workers 0 --data {data} --output {output} --device " + DEVICE
)

Network = Callable[..., QTViT]


@pytest.fixture
def network(
    tiny_architectures: Mapping[str, Architecture], randomize: Callable[[nn.Module, int], nn.Module]
) -> Network:
    def build(**args: Any) -> QTViT:
        model = randomize(QTViT(tiny_architectures["nano"], num_classes=NUM_CLASSES, img_size=16, **args), 0)
        return model.to(memory_format=torch.channels_last)

    return build


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels whose result does not depend on the order of threads, where CUDA has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(photos: Path, output: Path, *options: str) -> int:
    return main([*TRAIN.format(data=photos, output=output).split(), *options])


def state_of(run: Path) -> dict[str, Tensor]:
    return torch.load(run / LAST, weights_only=True, map_location="cpu")["state_dict"]


class Losses(Classifier):
    """Keeps the loss of each step."""

    losses: list[float]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_learns(precision: Any, dtype: torch.dtype, network: Network, tmp_path: Path) -> None:
    optim = {"label_smoothing": 0.0, "warmup_epochs": 0.0}
    config = configured(optim, ema={"decay": 0.5}, precision=precision, epochs=20, lr=0.003)
    task, dtypes = Losses(network(), NUM_CLASSES, config), set()
    task.model.stages[0][0].conv.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    batches = random_batches(1)
    fit(task, batches, tmp_path, stopping(tmp_path), held_out=batches, device=DEVICE)
    assert dtypes == {dtype}
    assert task.losses[-1] < 0.8 * task.losses[0]
    assert {value.dtype for value in task.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_the_scaler_backs_off_and_it_is_logged(network: Network, tmp_path: Path) -> None:
    model, calls, lowering = network(), [], Lowering()

    def second(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if module.training:
            calls.append(1)
        return InfiniteGradient.apply(output) if module.training and len(calls) == 2 else None

    model.head.fc.register_forward_hook(second)
    task = Classifier(model, NUM_CLASSES, configured(precision="16-mixed", epochs=1))
    batches = random_batches(4, 4)
    trainer = fit(task, batches, tmp_path, lowering, stopping(tmp_path), held_out=batches[:1], device=DEVICE)
    plugin: Any = trainer.precision_plugin
    halved = [after == before / 2 for before, after in pairwise([*lowering.scales, plugin.scaler.get_scale()])]
    assert len(halved) == 4
    assert halved[1]  # the others may be too: the scale begins high
    assert task.num_backoffs == sum(halved)
    assert trainer.logged_metrics["train/backoffs"] == sum(halved)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_bad_pixel_stops_training_in_half_precision(network: Network, tmp_path: Path) -> None:
    batches = random_batches(4, len(NAMES) // 4)
    batches[2][0][0, 0, 0, 0] = torch.nan
    task = Classifier(network(), NUM_CLASSES, configured(precision="16-mixed"))
    callback: StopAtNonFinite = stopping(tmp_path)
    with pytest.raises(FloatingPointError, match=r"batch 3; first bad layer: stages\.0\.0\.conv;"):
        fit(task, batches, tmp_path, callback, device=DEVICE)


def test_channels_last_is_kept(network: Network, tmp_path: Path) -> None:
    task, kept = Classifier(network(), NUM_CLASSES, configured(ema={"decay": 0.5}, epochs=1)), []

    def check(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        kept.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output, module.weight))

    for model in task.networks.values():
        for module in model.stages[0].modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(check)
    batches = random_batches(2)
    fit(task, batches, tmp_path, held_out=batches, device=DEVICE)
    assert len(kept) >= 3 * 3 * 4
    assert all(kept)


def test_compiled_training_is_eager_training(network: Network, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.compiler.reset()
        augment = {"train_sizes": [16, 24]}
        config = configured({"drop_path_ramp": True}, augment, compile=compiled, epochs=3, lr=0.001)
        task = Losses(network(), NUM_CLASSES, config)
        batches = random_batches(4, 8, [16, 24])
        fit(task, batches, tmp_path, held_out=batches[:1], device=DEVICE)
        losses.append(task.losses)
    torch.compiler.reset()
    assert losses[1][:4] == pytest.approx(losses[0][:4], rel=1e-2)
    assert losses[1][-1] < losses[1][0]


def test_compiled_half_precision_at_the_command_line(photos: Path, tmp_path: Path) -> None:
    options = ["--compile", "true", "--precision", "bf16-mixed", "--batch-size", "8", "--epochs", "2"]
    assert train(photos, tmp_path / "run", *options) == 0


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    precision: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--batch-size", "8", "--epochs", "3", "--precision", precision, "--model-args.drop_path_rate", "0.2"]
    options += ["--augment.mixup", "0.5", "--augment.cutmix", "0.5", "--ema.decay", "0.9"]
    assert train(photos, tmp_path / "whole", *options) == 0
    step, calls = Classifier.training_step, []

    def stepping(self: Classifier, batch: Batch, batch_idx: int) -> Tensor:
        calls.append(1)
        if len(calls) == 5:  # the second of the second epoch's three steps
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stepping)
        assert train(photos, tmp_path / "run", *options) == 130
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
    whole, resumed = state_of(tmp_path / "whole"), state_of(tmp_path / "run")
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_synchronised_batch_norm_is_one_gpu_with_twice_the_batch(photos: Path, tmp_path: Path) -> None:
    options = ["--epochs", "2", "--bn-images", "0", "--optim.warmup-epochs", "0"]
    one = ["--batch-size", "8", "--lr", "0.0002"]
    two = ["--batch-size", "4", "--lr", "0.0001", "--sync-bn", "true"]
    assert train(photos, tmp_path / "one", *options, *one) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*TRAIN.format(data=photos, output=tmp_path / "two").split(), *options, *two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "qtvit_cli", *argv], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    ours, want = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    assert ours.keys() == want.keys()
    for name in want:
        if "running" in name:
            torch.testing.assert_close(ours[name], want[name], rtol=0.02, atol=0.01, msg=lambda text, n=name: n + text)
