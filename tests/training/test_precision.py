"""What changes how a step is computed but not what it computes: precision, accumulation, checkpointing, compilation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from qtvit.bench.train import bytes_kept
from qtvit.models import QTViT
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.tasks.classify.train import Classifier
from qtvit_cli import main

from .fit import NUM_CLASSES, Batch, configured, fit, random_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")

Network = Callable[..., QTViT]


class Losses(Classifier):
    """Keeps the loss of each step."""

    def __init__(self, model: nn.Module, config: ClassifyConfig) -> None:
        super().__init__(model, NUM_CLASSES, config)
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def assert_close(ours: nn.Module, want: nn.Module, atol: float) -> None:
    state = ours.state_dict()
    for name, value in want.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=atol, msg=lambda text, name=name: name + text)


def test_bf16_learns_and_keeps_the_weights_in_fp32(network: Network, tmp_path: Path) -> None:
    optim = {"label_smoothing": 0.0, "warmup_epochs": 0.0}
    config = configured(optim, ema={"decay": 0.5}, precision="bf16-mixed", epochs=10, lr=0.003)
    task, dtypes = Losses(network(), config), set()
    task.model.stages[0][0].conv.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    batches = random_batches(1)
    fit(task, batches, tmp_path, held_out=batches)
    assert dtypes == {torch.bfloat16}
    assert task.losses[-1] < 0.8 * task.losses[0]
    assert {value.dtype for value in task.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert task.trainer.callback_metrics["val/top1"] <= 100


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--precision=16-mixed", "--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true"),
        ("--sync-bn=true", "--sync-bn needs GPUs; torch has no synchronised BatchNorm for the CPU"),
        ("--accumulate=0", "--accumulate must be 1 or more, got 0"),
    ],
)
def test_refused(option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "classify", "--data", "digits", "--device", "cpu", option]) == 2
    assert capsys.readouterr().err == f"qtvit: error: {message}\n"
    assert not (tmp_path / "runs").exists()


def test_two_accumulated_batches_are_one_of_twice_the_size(network: Network, tmp_path: Path) -> None:
    whole = random_batches(4)
    halves = [(images[part], labels[part]) for images, labels in whole for part in (slice(4), slice(4, 8))]
    options: dict[str, Any] = {"freeze_bn": True, "ema": {"decay": 0.5, "warmup_steps": 2}, "lr": 0.003}
    task = Classifier(network(), NUM_CLASSES, configured(**options))
    accumulating = Classifier(network(), NUM_CLASSES, configured(**options, accumulate=2))
    fit(task, whole, tmp_path)
    fit(accumulating, halves, tmp_path)
    assert accumulating.num_steps == task.num_steps == accumulating.global_step == 8
    assert accumulating.num_warmup == 4
    assert accumulating.ema is not None
    assert accumulating.ema.n_averaged == 9
    assert_close(accumulating, task, 5e-4)
    start = network().state_dict()
    assert max((value - start[name]).abs().max() for name, value in task.model.state_dict().items()) > 1e-2


def test_gradient_checkpointing_changes_nothing(network: Network, tmp_path: Path) -> None:
    options: dict[str, Any] = {"augment": {"mixup": 0.5, "cutmix": 0.5}, "lr": 0.001, "epochs": 1}
    plain, checkpointing = (
        Losses(network(drop_path_rate=0.3, drop_rate=0.2), configured(**options, grad_checkpointing=again))
        for again in (False, True)
    )
    for task in (plain, checkpointing):
        fit(task, random_batches(3), tmp_path)
    assert checkpointing.model.grad_checkpointing
    assert not plain.model.grad_checkpointing
    assert checkpointing.losses == pytest.approx(plain.losses, rel=1e-4)
    counts = {name: value for name, value in plain.state_dict().items() if "num_batches" in name}
    assert {int(checkpointing.state_dict()[name]) for name in counts} == {3}


def test_recomputing_activations_changes_nothing_but_memory(network: Network, tmp_path: Path) -> None:
    tasks = [Losses(network(), configured(epochs=1, recompute_activations=again)) for again in (True, False)]
    x = torch.randn(2, 3, 32, 32)
    again, kept = (bytes_kept(lambda task=task: task.model(x), task.model) for task in tasks)
    assert again < 0.6 * kept
    for task in tasks:
        fit(task, random_batches(3), tmp_path)
    assert tasks[1].losses == tasks[0].losses


def test_gradient_checkpointing_needs_a_model_that_can(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--grad-checkpointing: Linear has no set_grad_checkpointing"):
        Classifier(nn.Linear(2, 2), 2, configured(grad_checkpointing=True))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs that are compiled, and runs them as they are; torch would give up after two for one code."""
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **args: compile_module(self, **args, backend=counter))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield counter
    torch.compiler.reset()


def test_one_graph_for_each_size(counter: CompileCounter, network: Network, tmp_path: Path) -> None:
    sides = [8, 12, 16, 20]
    parts: dict[str, Any] = {
        "optim": {"drop_path_ramp": True},
        "augment": {"train_sizes": sides},
        "ema": {"decay": 0.5, "mesa_ratio": 1.0, "mesa_start": 0},
    }
    task = Losses(network(drop_path_rate=0.3), configured(**parts, compile=True, lr=0.001))
    batches = random_batches(4, 2, sides)
    fit(task, batches, tmp_path, held_out=batches[:1])
    assert counter.frame_count == 4
    plain = Losses(network(drop_path_rate=0.3), configured(**parts, lr=0.001))
    fit(plain, batches, tmp_path, held_out=batches[:1])
    assert task.losses == pytest.approx(plain.losses, rel=1e-3)
    assert list(task.state_dict()) == list(plain.state_dict())
