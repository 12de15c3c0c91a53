"""A run that was interrupted goes on as if it had not been."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qtvit.device import ignore_interrupts
from qtvit.tasks.classify.train import Classifier
from qtvit.training.callbacks import LAST, PREVIOUS, EstimateBatchNorm
from qtvit_cli import main

from .compare import same_end

pytestmark = pytest.mark.slow

TRAIN = (
    "train classify --model qtvit_nano --img-size 16 --epochs 3 --batch-size 8 --bn-images 8 --num-workers {workers} "
    "--data {data} --model-args.drop_path_rate 0.2 --model-args.drop_rate 0.1 --augment.auto-augment rand-m5-mstd1 "
    "--augment.random-erasing 0.3 --output {output}"
)


def train(data: Path, output: Path, workers: int = 0) -> int:
    return main(TRAIN.format(data=data, output=output, workers=workers).split())


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(photos, output) == 0
    return output


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Presses Ctrl-C in the ``call``-th call of a step of the run, once."""

    def press(where: str, call: int) -> None:
        owner, name = {
            "training": (Classifier, "training_step"),
            "evaluation": (Classifier, "validation_step"),
            "BatchNorm": (EstimateBatchNorm, "on_validation_start"),
        }[where]
        step, calls = getattr(owner, name), []

        def stepping(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return step(*args, **kwargs)

        monkeypatch.setattr(owner, name, stepping)

    return press


# 24 training images: three steps an epoch.
@pytest.mark.parametrize(
    ("where", "call", "workers"),
    [("training", 2, 0), ("training", 3, 0), ("training", 5, 1), ("evaluation", 1, 0), ("BatchNorm", 2, 0)],
)
def test_an_interrupted_run_goes_on_to_the_same_end(
    where: str,
    call: int,
    workers: int,
    photos: Path,
    uninterrupted: Path,
    tmp_path: Path,
    interrupt: Callable[[str, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt(where, call)
    assert train(photos, tmp_path / "run", workers) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"train classify --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["train", "classify", "--resume", str(tmp_path / "run"), "--num-workers", "0"]) == 0
    same_end(tmp_path / "run", uninterrupted)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_a_second_ctrl_c_stops_at_once(
    photos: Path, tmp_path: Path, interrupt: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt("training", 2)
    interrupt("training", 2)  # within the first one
    assert train(photos, tmp_path / "run") == 130
    assert "stopped; nothing is saved yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / LAST).exists()


def test_the_data_may_have_moved_but_not_changed(
    photos: Path,
    tmp_path: Path,
    uninterrupted: Path,
    interrupt: Callable[[str, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "moved").symlink_to(photos, target_is_directory=True)
    (tmp_path / "fewer").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "fewer" / name).symlink_to(photos / name, target_is_directory=True)
    interrupt("training", 4)
    assert train(photos, tmp_path / "run") == 130
    resume = ["train", "classify", "--resume", str(tmp_path / "run"), "--data"]
    assert main([*resume, str(tmp_path / "fewer")]) == 2
    assert "fewer is not what" in capsys.readouterr().err
    assert main([*resume, str(tmp_path / "moved")]) == 0
    same_end(tmp_path / "run", uninterrupted)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    photos: Path, tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(photos, tmp_path / "run") == 0
    last = tmp_path / "run" / LAST
    last.write_bytes(last.read_bytes()[:1000])
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
    assert f"{last} is damaged" in capsys.readouterr().out
    same_end(tmp_path / "run", uninterrupted)
    assert torch.load(tmp_path / "run" / PREVIOUS, weights_only=True)["epoch"] == 1  # the good one is still there
    assert last.with_suffix(".damaged").stat().st_size == 1000
    for name in (LAST, PREVIOUS):
        (tmp_path / "run" / name).write_bytes(b"")
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 2
    assert "last.ckpt and previous.ckpt cannot be read" in capsys.readouterr().err


def test_a_run_that_saved_nothing_starts_from_the_beginning(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(uninterrupted / "config.yaml", tmp_path / "run")
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
    assert "no last.ckpt in this folder; starting from the beginning" in capsys.readouterr().out
    same_end(tmp_path / "run", uninterrupted)


def test_a_run_without_its_report_gets_it(photos: Path, tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("summary.json", "scores.json", "curves.png"):
        (tmp_path / "run" / name).unlink()
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (uninterrupted, tmp_path / "run"))
    assert after["top1"] == before["top1"]
    assert after["train_seconds"] == pytest.approx(before["train_seconds"], abs=0.5)
    assert (tmp_path / "run" / "curves.png").is_file()
    same_end(tmp_path / "run", uninterrupted)


def test_a_run_that_stopped_early_is_finished(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = TRAIN.format(data=photos, output=tmp_path / "run", workers=0).split()
    assert main([*argv, "--epochs", "9", "--early-stopping", "1", "--lr", "1e-9"]) == 0
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 2
    assert "is finished" in capsys.readouterr().err


def test_a_missing_best_model_is_replaced(
    photos: Path, tmp_path: Path, interrupt: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt("training", 5)
    assert train(photos, tmp_path / "run") == 130
    (tmp_path / "run" / "best.safetensors").unlink()
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
    assert "best.safetensors is gone" in capsys.readouterr().out


def test_loader_processes_leave_ctrl_c_to_the_run() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupts(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_mistakes(uninterrupted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (["--resume", str(uninterrupted)], "is finished; --checkpoint"),
        (["--resume", str(tmp_path)], "no config.yaml in this folder"),
        (["--resume", str(uninterrupted), "--epochs", "9"], "--epochs cannot change when a run goes on"),
        (["--resume"], "--resume needs a value"),
        ([f"--resume={uninterrupted}", "--optim.weight-decay=0"], "--optim.weight-decay cannot change"),
    ]:
        assert main(["train", "classify", *argv]) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


def test_two_processes_do_not_share_a_run(
    photos: Path, tmp_path: Path, interrupt: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt("training", 2)
    assert train(photos, tmp_path / "run") == 130
    assert train(photos, tmp_path / "run") == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    with FileLock(tmp_path / "run" / ".lock"):
        assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 2
    assert "another process is training in this run folder" in capsys.readouterr().err
    assert main(["train", "classify", "--resume", str(tmp_path / "run")]) == 0
