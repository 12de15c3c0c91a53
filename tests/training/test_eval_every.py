"""Evaluation after some epochs only, on some of the training images."""

import csv
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtvit.models.build import ModelCost
from qtvit.tasks.classify import train as classify
from qtvit.tasks.classify.train import Classifier
from qtvit.training.callbacks import EstimateBatchNorm
from qtvit_cli import main

from .compare import same_end

pytestmark = pytest.mark.slow

# 20 of 24 training images: two steps an epoch; epochs 2 and 3 are evaluated.
TRAIN = (
    "train classify --model qtvit_nano --img-size 16 --epochs 3 --batch-size 8 --bn-images 8 --num-workers 0 "
    "--eval-every 2 --train-images 20 --ema.decay 0.5 --ema.warmup-steps 0 --augment.random-erasing 0.3"
)
EVALUATED = [2, 3]
SEVEN = "--epochs 7 --eval-every 3"


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "write_report", lambda *args: None)
        patch.setattr(classify, "model_cost", lambda *args: ModelCost(1, 1))
        yield


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*TRAIN.split(), "--data", str(photos), "--output", str(run)]) == 0
    return run


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_last_epoch_is_evaluated_whatever_the_interval(uninterrupted: Path) -> None:
    history = rows(uninterrupted)
    assert [int(row["epoch"]) for row in history if row["val/top1"]] == EVALUATED
    assert [int(row["epoch"]) for row in history if row["val/raw_loss"]] == EVALUATED
    assert len({row["train/loss"] for row in history}) == 3
    assert (uninterrupted / "curves.png").is_file()


def test_the_interval_changes_nothing_else(photos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN.split(), "--data", str(photos), "--output", str(run), "--eval-every", "9"]) == 0
    often, once = rows(uninterrupted), rows(run)
    assert [row["val/top1"] for row in once[:-1]] == [""] * 2
    for name in ("train/loss", "lr", "step"):
        assert [row[name] for row in once] == [row[name] for row in often]
    assert once[-1]["val/raw_loss"] == often[-1]["val/raw_loss"]


@pytest.mark.parametrize(("where", "call"), [("step", 2), ("step", 3), ("BatchNorm", 1)])
def test_an_interrupted_run_goes_on_to_the_same_end(
    where: str,
    call: int,
    photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name = {
        "step": (Classifier, "training_step"),
        "BatchNorm": (EstimateBatchNorm, "on_validation_start"),
    }[where]
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args: object) -> object:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    monkeypatch.setattr(owner, name, interrupted)
    run = tmp_path / "run"
    assert main([*TRAIN.split(), "--data", str(photos), "--output", str(run)]) == 130
    assert main(["train", "classify", "--resume", str(run)]) == 0
    assert "is gone" not in capsys.readouterr().out
    same_end(run, uninterrupted)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that are evaluated, in turn."""
    epochs: list[int] = []
    function = Classifier.on_validation_epoch_end

    def counted(task: Classifier) -> None:
        epochs.append(task.current_epoch + 1)
        function(task)

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", counted)
    return epochs


@pytest.fixture(scope="module")
def seven(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("seven") / "run"
    assert main([*TRAIN.split(), *SEVEN.split(), "--data", str(photos), "--output", str(run)]) == 0
    return run


# The first steps of epochs 3, 4 and 7: in the middle of an epoch that is evaluated, of one that is not, of the last.
@pytest.mark.parametrize("step", [5, 7, 13])
def test_a_resumed_run_evaluates_the_same_epochs_once(
    step: int, photos: Path, seven: Path, validated: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [int(row["epoch"]) for row in rows(seven) if row["val/top1"]] == [3, 6, 7]
    function, calls = Classifier.training_step, itertools.count(1)

    def interrupted(*args: object) -> object:
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    run = tmp_path / "run"
    assert main([*TRAIN.split(), *SEVEN.split(), "--data", str(photos), "--output", str(run)]) == 130
    assert main(["train", "classify", "--resume", str(run)]) == 0
    assert validated == [3, 6, 7]
    same_end(run, seven)


def test_early_stopping_counts_evaluations(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TRAIN.split(), "--data", str(photos), "--output", str(tmp_path / "run"), "--ema.decay", "0"]
    assert main([*argv, "--epochs", "9", "--eval-every", "2", "--early-stopping", "1", "--lr", "1e-9"]) == 0
    assert "no better top-1 in 1 evaluation\n" in capsys.readouterr().out
    assert len(rows(tmp_path / "run")) == 4
