"""The steps of training, against the published recipe written out as a plain loop, and numbers computed by hand."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.data.sampling import seed_everywhere
from qtvit.layers import DropPath
from qtvit.models import QTViT
from qtvit.tasks.classify import mixing
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.tasks.classify.train import Classifier, classification_loss
from qtvit.training.config import OptimConfig
from qtvit.training.optim import make_optimizer

from .fit import NUM_CLASSES, Batch, configured, fit, random_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`", "ignore:.*trainer` reference")

Network = Callable[..., QTViT]
LR, EPOCHS, BATCHES, WARMUP = 0.01, 3, 3, 3  # a warm-up of one epoch of three steps
ON: dict[str, dict[str, Any]] = {
    "optim": {
        "loss": "bce",
        "weight_decay": 0.1,
        "warmup_epochs": 1,
        "drop_path_ramp": True,
        "grad_clip": 0.002,
        "label_smoothing": 0.1,
    },
    "augment": {"mixup": 0.5, "cutmix": 0.5, "mix_alpha": 0.8},
    "ema": {"decay": 0.9, "warmup_steps": 5, "mesa_ratio": 2.0, "mesa_start": 0.25},
}


class Watch(Callback):
    """Learning rate, progress and largest entry of the clipped gradients of each step."""

    def __init__(self) -> None:
        self.lr: list[float] = []
        self.clipped: list[float] = []
        self.progress: list[float] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.progress.append(pl_module.progress)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        self.clipped.append(max(p.grad.abs().max().item() for p in pl_module.model.parameters()))


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).mean()


def plain_loop(model: QTViT, batches: list[Batch], config: ClassifyConfig) -> dict[str, Tensor] | None:
    """Train ``model`` on the batches in every epoch; the moving average, if there is one.

    Sums are taken in the order of the code that is tested: AdamW makes whole steps of rounding errors where the true
    gradient is zero, as for biases before a norm.
    """
    optim, augment, ema = config.optim, config.augment, config.ema
    exempt = model.no_weight_decay()
    decayed = [parameter for name, parameter in model.named_parameters() if name not in exempt]
    others = [parameter for name, parameter in model.named_parameters() if name in exempt]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": optim.weight_decay}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    rates = [(m, m.drop_prob.item()) for m in model.modules() if isinstance(m, DropPath)]
    average = copy.deepcopy(model).eval() if ema.decay else None
    steps = config.epochs * len(batches)
    for step in range(steps):
        epoch, number = divmod(step, len(batches))
        images, labels = batches[number][0].contiguous(memory_format=torch.channels_last), batches[number][1]
        progress = max(step - WARMUP, 0) / (steps - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * ((step + 1) / WARMUP if step < WARMUP else (1 + math.cos(math.pi * progress)) / 2)
        for module, rate in rates:
            module.drop_prob.fill_(rate * progress if optim.drop_path_ramp else rate)
        seed_everywhere(config.seed, epoch, number, 0)
        targets = mixing.soft_targets(labels, NUM_CLASSES, optim.label_smoothing)
        odds = {"mixup": augment.mixup, "cutmix": augment.cutmix}
        images, targets = mixing.mix(images, targets, **odds, alpha=augment.mix_alpha)
        logits = model(images)
        loss = bce(logits, targets)
        if average is not None and ema.mesa_ratio and progress >= ema.mesa_start:
            with torch.no_grad():
                beliefs = average(images).sigmoid()
            loss = loss + ema.mesa_ratio * bce(logits, beliefs)
        optimizer.zero_grad()
        loss.backward()
        if optim.grad_clip is not None:
            nn.utils.clip_grad_value_(model.parameters(), optim.grad_clip)
        optimizer.step()
        if average is not None:
            keep = ema.decay * (1 - math.exp(-(step + 1) / ema.warmup_steps))
            for ours, now in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                ours.copy_(ours.lerp(now, 1 - keep) if now.is_floating_point() else now)
    return None if average is None else average.state_dict()


def difference(ours: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    assert ours.keys() == want.keys()
    return max((ours[key].double() - want[key].double()).abs().max().item() for key in want)


@pytest.fixture(scope="module")
def with_all_parts(network: Network) -> dict[str, Tensor]:
    model = network(drop_path_rate=0.4).train()
    plain_loop(model, random_batches(BATCHES), configured(**ON, lr=LR, epochs=EPOCHS))
    return model.state_dict()


def part(group: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {**ON, group: {**ON[group], **options}}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(ON, id="all"),
        pytest.param(part("ema", decay=0.0, mesa_ratio=0.0), id="no average"),
        pytest.param(part("ema", mesa_ratio=0.0), id="no MESA"),
        pytest.param(part("augment", mixup=0.0, cutmix=0.0), id="no mixing"),
        pytest.param(part("augment", mixup=0.0, cutmix=1.0), id="no MixUp"),
        pytest.param(part("augment", mixup=1.0, cutmix=0.0), id="no CutMix"),
        pytest.param(part("optim", drop_path_ramp=False), id="no ramp"),
        pytest.param(part("optim", grad_clip=None), id="no clipping"),
        pytest.param(part("optim", label_smoothing=0.0), id="no smoothing"),
        pytest.param(part("optim", weight_decay=0.0), id="no decay"),
    ],
)
def test_training_is_the_plain_loop(
    parts: dict[str, dict[str, Any]], network: Network, with_all_parts: dict[str, Tensor], tmp_path: Path
) -> None:
    config = configured(**parts, lr=LR, epochs=EPOCHS)
    batches = random_batches(BATCHES)
    task = Classifier(network(drop_path_rate=0.4), NUM_CLASSES, config)
    fit(task, batches, tmp_path)
    model = network(drop_path_rate=0.4).train()
    average = plain_loop(model, batches, config)
    assert difference(task.model.state_dict(), model.state_dict()) == 0
    assert (task.ema is None) == (average is None)
    if task.ema is not None and average is not None:
        assert difference(task.ema.module.state_dict(), average) == 0
    if parts is not ON:  # what is off had an effect
        assert difference(model.state_dict(), with_all_parts) > 1e-4


def test_rate_progress_and_clipping_of_every_step(network: Network, tmp_path: Path) -> None:
    watch = Watch()
    config = configured(**ON, lr=LR, epochs=EPOCHS)
    fit(Classifier(network(), NUM_CLASSES, config), random_batches(BATCHES), tmp_path, watch)
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert watch.lr == pytest.approx([LR * factor for factor in (1 / 3, 2 / 3, 1, *cosine)])
    assert watch.progress == pytest.approx([0, 0, 0, *(step / 6 for step in range(6))])
    assert watch.clipped == pytest.approx([0.002] * 9)  # the entries, not the norm


@pytest.mark.parametrize("world_size", [1, 8])
def test_the_learning_rate_is_multiplied_by_the_processes(world_size: int, network: Network) -> None:
    task = Classifier(network(), NUM_CLASSES, configured({"warmup_epochs": 2}, lr=0.00025, epochs=32))
    trainer: Any = SimpleNamespace(world_size=world_size, estimated_stepping_batches=320)
    task.trainer = trainer
    configuration = task.configure_optimizers()
    optimizer, schedule = configuration["optimizer"], configuration["lr_scheduler"]["scheduler"]
    assert configuration["lr_scheduler"]["interval"] == "step"
    seen = []
    for _ in range(321):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = 0.00025 * world_size
    assert seen[:20] == pytest.approx([peak * (step + 1) / 20 for step in range(20)])
    assert seen[20] == pytest.approx(peak)
    assert seen[170] == pytest.approx(peak / 2)
    assert seen[320] == pytest.approx(0, abs=1e-12)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8


def test_muon_orthogonalises_the_updates_of_matrices_alone(network: Network) -> None:
    model, lr = network(), 0.01
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_optimizer(model, lr, OptimConfig(name="muon", weight_decay=0.0, momentum=0.9, betas=(0.8, 0.9)))
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    optimizer.step()
    matrices = set()
    for name, parameter in model.named_parameters():
        update = (before[name] - parameter.detach()) / lr
        if update.ndim > 1 and 1 not in update.shape[:2]:
            matrices.add(name)
            sides = update.flatten(1).shape
            scaled = torch.linalg.svdvals(update.flatten(1)) / (0.2 * max(sides) ** 0.5)
            assert scaled.median() == pytest.approx(1, abs=0.15), name
            assert scaled.max() < 1.25, name
        else:  # the first step of Adam with Nesterov's momentum is as long for every entry
            torch.testing.assert_close(update.abs(), torch.full_like(update, 1.8), rtol=0.02, atol=0, msg=name)
    assert {"stages.0.0.conv.weight", "stages.1.1.attn.qkv.weight", "head.fc.weight"} <= matrices
    assert not any(part in name for name in matrices for part in ("depth_conv", "pos_embed", "aggregate.0", "norm"))


def test_muon_decays_what_adamw_does(network: Network) -> None:
    decayed = []
    for name in ("adamw", "muon"):
        model = network()
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        make_optimizer(model, 0.1, OptimConfig(name=name, weight_decay=0.5)).step()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[key] * (1 if key in model.no_weight_decay() else 0.95))
        decayed.append(model.state_dict())
    assert difference(*decayed) < 1e-7


def test_cross_entropy_is_torchs() -> None:
    logits, labels = 3 * torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 3])
    targets = mixing.soft_targets(labels, 4, 0.1)
    loss = classification_loss(logits, targets, "ce")
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
    plain = classification_loss(logits, mixing.soft_targets(labels, 4, 0.0), "ce")
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    by_hand = -(weights * targets * logits.log_softmax(1)).sum() / 6
    torch.testing.assert_close(classification_loss(logits, targets, "ce", weights), by_hand)


def test_binary_cross_entropy_by_hand() -> None:
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-ln 3) = 1/4
    logits = torch.tensor([[math.log(3), 0.0], [-math.log(3), math.log(3)]])
    targets = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    ln4, ln2, ln43 = math.log(4), math.log(2), math.log(4 / 3)
    first = (0.95 * ln43 + 0.05 * ln4, ln2)
    second = (0.95 * ln43 + 0.05 * ln4, 0.95 * ln43 + 0.05 * ln4)
    loss = classification_loss(logits, targets, "bce")
    assert loss.item() == pytest.approx((sum(first) + sum(second)) / 4)
    weights = torch.tensor([2.0, 4.0])  # of the images: 0.95 · 2 + 0.05 · 4 and 0.05 · 2 + 0.95 · 4
    weighted = classification_loss(logits, targets, "bce", weights)
    assert weighted.item() == pytest.approx((2.1 * sum(first) / 2 + 3.9 * sum(second) / 2) / 2)
    assert classification_loss(logits.bfloat16(), targets, "bce").dtype == torch.float32


def test_class_weights_reach_the_step(network: Network) -> None:
    batch = random_batches(1)[0]
    weights = torch.arange(1.0, NUM_CLASSES + 1)
    plain, weighted = (
        Classifier(network(), NUM_CLASSES, configured(), given).eval().training_step(batch, 0)
        for given in (None, weights)
    )
    logits = network().eval()(batch[0])
    targets = mixing.soft_targets(batch[1], NUM_CLASSES, 0.1)
    torch.testing.assert_close(plain, classification_loss(logits, targets, "ce"))
    torch.testing.assert_close(weighted, classification_loss(logits, targets, "ce", weights))


def test_the_odds_of_mixing_reach_the_step(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"blend": 0, "paste": 0}

    def counting(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        mixed = getattr(mixing, name)

        def count(*args: Any) -> tuple[Tensor, Tensor]:
            counts[name] += 1
            return mixed(*args)

        return count

    for name in counts:
        monkeypatch.setattr(mixing, name, counting(name))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    task = Classifier(model, NUM_CLASSES, configured(augment={"mixup": 0.5, "cutmix": 0.5}))
    batch = random_batches(1, size=2, sides=[4])[0]
    for step in range(400):
        task.on_train_batch_start(batch, step)
        task.training_step(batch, step)
    assert sum(counts.values()) == 400
    assert counts["blend"] == pytest.approx(200, abs=40)


def test_mesa_learns_from_the_average_on_the_mixed_batch(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classifier(network(), NUM_CLASSES, configured(**ON))
    assert task.ema is not None
    with torch.no_grad():
        for parameter in task.ema.module.parameters():
            parameter.add_(0.05)
    before = {name: value.clone() for name, value in task.ema.state_dict().items()}
    seen: list[Tensor] = []
    task.ema.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = random_batches(1)[0]
    losses = {}
    for progress in (0.0, 0.24, 0.25, 1.0):
        monkeypatch.setattr(Classifier, "progress", progress)
        task.eval()
        seed_everywhere(1)
        losses[progress] = task.training_step(batch, 0)
    off, images = losses[0.0], seen[0]
    assert losses[0.24] == off
    assert losses[1.0] == losses[0.25]
    assert len(seen) == 6  # the average is called for twice, with what the model sees
    assert all(torch.equal(other, images) for other in seen)
    assert not torch.equal(images, batch[0])
    logits, beliefs = network().eval()(images), task.ema(images).sigmoid()
    second = -(beliefs * F.logsigmoid(logits) + (1 - beliefs) * F.logsigmoid(-logits)).mean()
    assert losses[1.0].item() == pytest.approx(off.item() + 2 * second.item(), rel=1e-5)
    losses[1.0].backward()
    assert all(parameter.grad is None for parameter in task.ema.parameters())
    assert difference(task.ema.state_dict(), before) == 0
