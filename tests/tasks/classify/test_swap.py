"""The kernel swap, and learning from a teacher."""

import copy
import csv
import itertools
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo, load_model, save_model
from qtvit.data import Preprocess
from qtvit.models import QTViT, build_model
from qtvit.models.build import ModelCost
from qtvit.tasks.classify import train as classify
from qtvit.tasks.classify.config import ClassifyConfig, DistillConfig
from qtvit.tasks.classify.data import load_labelled_images
from qtvit.tasks.classify.distill import Distillation, attention_stages, feature_loss, logit_loss
from qtvit.tasks.classify.evaluate import evaluate
from qtvit.tasks.classify.mixing import soft_targets
from qtvit.tasks.classify.predict import ClassPredictor
from qtvit.tasks.classify.train import CURVES, Classifier, classification_loss
from qtvit.training import plots
from qtvit.training.callbacks import LAST
from qtvit.training.options import parse_config
from qtvit_cli import main
from tests.training.compare import same_end
from tests.training.conftest import COLORS
from tests.training.fit import NUM_CLASSES, configured, fit, random_batches

pytestmark = pytest.mark.slow

Network = Callable[..., QTViT]
EFFICIENTVIT = {"kernel": "relu", "ape": False, "shortcut": False}
# 24 training images: three steps an epoch.
SWAP = (
    "train classify --recipe swap/efficientvit_to_qtvit --data {data} --checkpoint {source} --output {output} "
    "--epochs 2 --batch-size 8 --bn-images 8 --num-workers 0 --num-threads 1"
)


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "write_report", lambda *args: None)
        patch.setattr(classify, "model_cost", lambda *args: ModelCost(1, 1))
        yield


def save(
    path: Path, model: nn.Module, name: str, model_args: dict[str, Any], classes: list[str], **fields: Any
) -> Path:
    """A model file for images of 16 px."""
    preprocess = {**asdict(Preprocess(size=(16, 16))), **fields}
    save_model(path, model.state_dict(), ModelInfo(name, model_args, classes, preprocess))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, randomize: Callable[[nn.Module, int], nn.Module]) -> Path:
    """An EfficientViT, under which every part of it matters, for the classes of the photos."""
    model_args = {**EFFICIENTVIT, "num_classes": 3, "img_size": (16, 16)}
    model = randomize(build_model("qtvit_nano", **model_args), 0)
    return save(
        tmp_path_factory.mktemp("source") / "efficientvit.safetensors", model, "qtvit_nano", model_args, [*COLORS]
    )


@pytest.fixture(scope="module")
def swapped(photos: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the recipe, uninterrupted."""
    run = tmp_path_factory.mktemp("swapped") / "run"
    assert main(SWAP.format(data=photos, source=source, output=run).split()) == 0
    return run


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# The swap


def test_a_run_starts_from_the_swapped_checkpoint(photos: Path, source: Path, tmp_path: Path) -> None:
    """A run that learns nothing leaves it as it was."""
    argv = SWAP.format(data=photos, source=source, output=tmp_path / "run").split()
    still = ["--epochs", "1", "--lr", "1e-30", "--freeze-bn", "true", "--bn-images", "0", "--ema.decay", "0"]
    assert main([*argv, *still]) == 0
    (before, _), (after, info) = load_model(source, swap_kernel=True), load_model(tmp_path / "run")
    assert isinstance(after, QTViT)
    assert after.kernel == "taylor2"
    assert not info.model_args.keys() & EFFICIENTVIT.keys()
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=1e-20)


def test_epoch_0_is_the_swapped_checkpoint(photos: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    argv = SWAP.format(data=photos, source=source, output=tmp_path / "run").split()
    assert main([*argv, "--epochs", "1", "--bn-images", "0"]) == 0
    first, last = rows(tmp_path / "run")
    held_out = load_labelled_images(str(photos)).val
    evaluation = evaluate(ClassPredictor(*load_model(source, swap_kernel=True), "cpu"), held_out)
    assert (first["epoch"], first["step"], last["epoch"], last["step"]) == ("0", "0", "1", "3")
    assert float(first["val/top1"]) == pytest.approx(evaluation.accuracy(), abs=1e-3)
    assert float(first["val/loss"]) == pytest.approx(evaluation.loss(), rel=1e-4)
    assert float(first["val/loss"]) == pytest.approx(float(first["val/raw_loss"]), rel=1e-6)
    assert (first["train/loss"], first["lr"]) == ("", "")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines[0].startswith(f"epoch 0/1  held-out loss {float(first['val/loss']):.4f}  top-1 ")
    assert lines[0].endswith("(before the first step)")
    assert lines[1].startswith("epoch 1/1  loss ")


def test_curves_begin_at_epoch_0(swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, out: figures.append(figure))
    plots.plot_curves(swapped / "metrics.csv", tmp_path / "curves.png", CURVES)
    lines = {line.get_label(): list(line.get_xdata()) for line in figures[0].axes[0].lines}
    assert lines == {"training": [1, 2], "held out": [0, 1, 2]}


def test_without_a_swap_there_is_no_epoch_0(run: Path) -> None:
    assert rows(run)[0]["epoch"] == "1"


# The losses


def test_logit_loss_by_hand() -> None:
    """Two images, two classes, T = 2: logits of 2 log 3 become odds of 3 to 1."""
    logits, teacher = torch.zeros(2, 2), torch.tensor([[2 * 3**0.0, 0.0], [0.0, 0.0]])
    teacher[0, 0] = 2 * torch.tensor(3.0).log()
    p = torch.tensor([0.75, 0.25])
    divergence = (p * (p / 0.5).log()).sum()
    torch.testing.assert_close(logit_loss(logits, teacher, 2.0, "ce"), 4 * divergence / 2)
    # As sigmoids: of the four, one is 3/4 for the teacher and all others are 1/2 for both.
    torch.testing.assert_close(logit_loss(logits, teacher, 2.0, "bce"), 4 * divergence / 4)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_logit_loss_is_least_at_the_teacher(kind: str) -> None:
    teacher = 3 * torch.randn(4, 5)
    logits = teacher.clone().requires_grad_()
    loss = logit_loss(logits, teacher, 3.0, kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
    assert logit_loss(teacher + torch.randn(4, 5), teacher, 3.0, kind) > 0.01


def test_at_temperature_1_the_gradient_is_that_of_soft_labels() -> None:
    teacher = torch.randn(4, 5)
    for kind, targets in (("ce", teacher.softmax(-1)), ("bce", teacher.sigmoid())):
        ours, theirs = (torch.linspace(-1, 1, 20).reshape(4, 5).requires_grad_() for _ in range(2))
        logit_loss(ours, teacher, 1.0, kind).backward()
        classification_loss(theirs, targets, kind).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_feature_loss_by_hand() -> None:
    maps = [torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1)]
    teacher = [torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)]
    assert feature_loss(maps, teacher).item() == pytest.approx((5 / 5 + 1 / 25) / 2)
    assert feature_loss(maps, [1000 * t for t in maps[1:]] * 2).isfinite()
    assert feature_loss([m.half() for m in maps], [t.half() for t in teacher]).dtype == torch.float32


def distilled(network: Network, **options: Any) -> tuple[QTViT, Distillation, Any]:
    """A student and its teacher, of other weights and another kernel, and the configuration."""
    distill = {"teacher": "t", "logits": 0.5, "features": 3.0, "temperature": 2.0}
    config = configured(distill=DistillConfig(**{**distill, **options.pop("distill", {})}), **options)
    teacher = network(**EFFICIENTVIT)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return network().train(), Distillation(teacher, config), config


@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("weights", [{}, {"logits": 0.0}, {"features": 0.0}], ids=["both", "features", "logits"])
def test_a_step_adds_the_losses_up(
    kind: str, weights: dict[str, float], network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, distillation, config = distilled(network, optim={"loss": kind}, distill=weights, epochs=1)
    student, teacher = copy.deepcopy(model), copy.deepcopy(distillation.teacher)
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []
    monkeypatch.setattr(Classifier, "count_loss", lambda self, loss, n, parts: seen.append((loss, parts)))
    [(images, labels)] = batches = random_batches(1)
    fit(Classifier(model, NUM_CLASSES, config, distillation=distillation), batches, tmp_path)

    logits, theirs = student(images), teacher(images)
    maps, their_maps = (m.forward_intermediates(images, intermediates_only=True)[1:] for m in (student, teacher))
    want = {
        "distill_logits": logit_loss(logits, theirs, 2.0, kind),
        "distill_features": feature_loss(maps, their_maps),
    }
    expected = classification_loss(logits, soft_targets(labels, NUM_CLASSES, 0.1), kind)
    for name, weight in {"distill_logits": 0.5, "distill_features": 3.0}.items():
        if weights.get(name.removeprefix("distill_")) == 0:
            del want[name]
        else:
            expected = expected + weight * want[name]
    [(loss, parts)] = seen
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, want, rtol=1e-4, atol=1e-5)


def test_stages_with_attention() -> None:
    assert attention_stages(build_model("qtvit_nano")) == [1, 2]
    with torch.device("meta"):
        assert attention_stages(build_model("qtvit_1")) == [3, 4]
        assert attention_stages(build_model("qtvit_4")) == [4]


def test_the_teacher_stays_as_it_is_and_sees_what_the_student_sees(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed images, in evaluation mode, without gradients."""
    model, distillation, config = distilled(network, augment={"mixup": 1.0}, ema={"decay": 0.5})
    before = distillation.digest()
    seen: dict[nn.Module, list[Tensor]] = {}
    for part in (model, distillation.teacher):
        part.stages[0].register_forward_pre_hook(lambda m, args, part=part: seen.setdefault(part, []).append(args[0]))
    task = Classifier(model, NUM_CLASSES, config, distillation=distillation)
    batches = random_batches(2)
    fit(task, batches, tmp_path)
    assert len(seen[model]) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen[model], seen[distillation.teacher], strict=True))
    assert not torch.equal(seen[model][0], batches[0][0])
    assert distillation.digest() == before
    assert not distillation.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in distillation.teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    assert {name.partition(".")[0] for name in task.state_dict()} == {"model", "ema"}
    own, optimised = set(model.parameters()), task.trainer.optimizers[0].param_groups
    assert {p for group in optimised for p in group["params"]} == own


def test_compiled_steps_are_the_same(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return real(function, backend="eager", **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    ends = []
    for on in (False, True):
        model, distillation, config = distilled(network, compile=on, lr=1e-3, epochs=1)
        fit(Classifier(model, NUM_CLASSES, config, distillation=distillation), random_batches(1), tmp_path / str(on))
        ends.append(model.state_dict())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=2e-3)
    assert "_run" in [getattr(function, "__name__", "") for function in compiled]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_finite_in_any_precision(precision: str, network: Network, tmp_path: Path) -> None:
    model, distillation, config = distilled(network, precision=precision, lr=1e-3)
    task = Classifier(model, NUM_CLASSES, config, distillation=distillation)
    trainer = fit(task, random_batches(2), tmp_path, held_out=random_batches(1))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert 0 < logged["train/distill_logits"] < logged["train/loss"]
    assert 0 < 3 * logged["train/distill_features"] < logged["train/loss"]


# A run and its teacher


def test_what_a_run_logs_and_saves(swapped: Path) -> None:
    assert load_model(swapped)[1].metrics["epoch"] in (1, 2)
    _, *history = rows(swapped)
    for row in history:
        parts = [float(row[f"train/{name}"]) for name in ("loss", "distill_logits", "distill_features")]
        assert 0 < parts[1] + parts[2] < parts[0]
    state = torch.load(swapped / LAST, weights_only=True)
    model = load_model(swapped)[0]
    names = {f"model.{name}" for name in model.state_dict()} | {f"ema.module.{name}" for name in model.state_dict()}
    assert set(state["state_dict"]) == names | {"ema.n_averaged"}
    assert len(state["optimizer_states"][0]["state"]) == len(list(model.parameters()))


@pytest.mark.parametrize("call", [2, 5])
def test_an_interrupted_run_goes_on_to_the_same_end(
    call: int, photos: Path, source: Path, swapped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = interrupted(photos, source, tmp_path / "run", call, monkeypatch)
    assert main(["train", "classify", "--resume", str(run)]) == 0
    same_end(run, swapped)
    assert [row["epoch"] for row in rows(run)] == ["0", "1", "2"]


def interrupted(photos: Path, source: Path, run: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's run with Ctrl-C in the ``call``-th step."""
    step, calls = Classifier.training_step, itertools.count(1)

    def stepping(*args: Any) -> Tensor:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Classifier, "training_step", stepping)
    assert main(SWAP.format(data=photos, source=source, output=run).split()) == 130
    return run


def test_a_run_does_not_go_on_without_its_teacher(
    photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine = Path(shutil.copy(source, tmp_path / "mine.safetensors"))
    run = interrupted(photos, mine, tmp_path / "run", 4, monkeypatch)
    mine.rename(tmp_path / "elsewhere.safetensors")
    capsys.readouterr()
    assert main(["train", "classify", "--resume", str(run)]) == 2
    assert (
        f"{run} cannot go on without its teacher: {mine}: no such run folder or model file" in capsys.readouterr().err
    )
    model, info = load_model(tmp_path / "elsewhere.safetensors")
    with torch.no_grad():
        next(model.parameters())[0] += 1
    save_model(mine, model.state_dict(), info)
    assert main(["train", "classify", "--resume", str(run)]) == 2
    assert f"{mine} is not the teacher that {run} was learning from" in capsys.readouterr().err
    (tmp_path / "elsewhere.safetensors").replace(mine)
    assert main(["train", "classify", "--resume", str(run)]) == 0
    mine.unlink()
    (run / "summary.json").unlink()
    assert main(["train", "classify", "--resume", str(run)]) == 0  # to write its report


def test_the_recorded_teacher_is_found_from_anywhere(source: Path, swapped: Path, tmp_path: Path) -> None:
    config = parse_config(["--recipe", str(swapped / "config.yaml")], ClassifyConfig)
    assert config.checkpoint == str(source)
    assert config.swap_kernel
    assert config.distill.teacher is None


def test_a_checkpoint_that_is_swapped_already_is_told(
    photos: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "converted.safetensors"
    model, info = load_model(source, swap_kernel=True)
    save_model(path, model.state_dict(), info)
    argv = SWAP.format(data=photos, source=path, output=tmp_path / "run").split()
    assert main([*argv, "--epochs", "1"]) == 0
    assert f"{path} has this attention already: nothing is swapped, and the teacher" in capsys.readouterr().out


def test_a_teacher_of_another_kind_teaches_logits(photos: Path, tmp_path: Path, capsys: Any) -> None:
    teacher = build_model("resnet10t", num_classes=3)
    path = save(tmp_path / "resnet.safetensors", teacher, "resnet10t", {"num_classes": 3}, [*COLORS])
    argv = f"train classify --model qtvit_nano --img-size 16 --data {photos} --epochs 1 --batch-size 8 --bn-images 8"
    taught = [*argv.split(), "--num-workers", "0", "--distill.teacher", path.name, "--distill.logits", "1"]
    assert main([*taught, "--output", str(tmp_path / "run"), "--quiet"]) == 0
    assert float(rows(tmp_path / "run")[0]["train/distill_logits"]) > 0
    assert parse_config(["--recipe", str(tmp_path / "run" / "config.yaml")], ClassifyConfig).distill.teacher == str(
        path
    )
    assert main([*taught, "--distill.features", "1"]) == 2
    assert "--distill.features 1 compares stages of our own models, the teacher's model is resnet10t" in (
        capsys.readouterr().err
    )


def test_a_teacher_of_other_classes_teaches_features(photos: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("blue", "red"):
        shutil.copytree(photos / name, tmp_path / "two" / name)
    argv = [*SWAP.format(data=tmp_path / "two", source=source, output=tmp_path / "run").split(), "--epochs", "1"]
    assert main(argv) == 2
    message = "tells 3 other classes apart (blue, green, red) than blue, red; --distill.logits 0 leaves the features"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--distill.logits", "0"]) == 0
    assert len(load_model(tmp_path / "run")[1].classes) == 2
    assert "train/distill_logits" not in rows(tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--swap-kernel true", "--swap-kernel true takes over the weights of a --checkpoint, and none is given"),
        ("--distill.logits 1", "--distill.logits and --distill.features need a --distill.teacher or a --checkpoint"),
        ("--distill.features 1", "--distill.features need a --distill.teacher or a --checkpoint"),
        ("--distill.logits -1", "--distill.logits must be 0 or more, got -1.0"),
        ("--distill.temperature 0", "--distill.temperature must be more than 0, got 0.0"),
        ("--distill.teacher x", "--distill.teacher must be null without distill.logits and distill.features, got 'x'"),
        ("--distill.logit 1", "unknown option '--distill.logit'; did you mean --distill.logits"),
        ("--checkpoint {source} --model-args.kernel taylor2", "was trained with kernel relu, not taylor2"),
        ("--checkpoint {source} --model-args.kernel taylor2", "; --swap-kernel true takes over the weights that both"),
        ("--checkpoint {source} --model-args.ape true", "; --swap-kernel true takes over the weights that both have"),
        ("--distill.teacher no.safetensors --distill.logits 1", "no.safetensors: no such run folder or model file"),
        (
            "--distill.teacher {l} --distill.features 1",
            "the stages of the teacher's qtvit_0 (width, stride: (64, 16), ",
        ),
        (
            "--distill.teacher {l} --distill.logits 1",
            "the teacher {l}: --img-size or --augment.train-sizes 16x16 is below",
        ),
        (
            "--distill.teacher {gray} --distill.logits 1",
            "gray.safetensors takes images of mean [0.5, 0.5, 0.5], qtvit_n",
        ),
    ],
)
def test_mistakes(
    options: str, message: str, photos: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = build_model("qtvit_0", num_classes=3)
    paths = {
        "source": source,
        "l": save(tmp_path / "large.safetensors", large, "qtvit_0", {"num_classes": 3}, [*COLORS]),
        "gray": Path(shutil.copy(source, tmp_path / "gray.safetensors")),
    }
    model, info = load_model(source)
    save(paths["gray"], model, info.model, info.model_args, info.classes, mean=(0.5, 0.5, 0.5))
    argv = f"train classify --data {photos} --img-size 16 --num-workers 0 --epochs 1 --batch-size 8 --output run"
    assert main([*argv.split(), *options.format(**paths).split(), *model_option(options)]) == 2
    captured = capsys.readouterr().err
    assert message.format(**paths) in captured
    assert captured.count("\n") == 1
    assert not Path("run").exists()


def model_option(options: str) -> list[str]:
    return [] if "--checkpoint" in options else ["--model", "qtvit_nano"]
