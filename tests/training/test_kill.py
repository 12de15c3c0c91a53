"""A run that is killed, or finds the disk full, goes on as if nothing had happened.

Training takes place in processes that a server forks, which has imported torch and Lightning once.
"""

import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtvit.tasks.classify import train as classify
from qtvit.tasks.classify.pack import pack_folder
from qtvit.training import job
from qtvit.training.callbacks import LAST, EstimateBatchNorm
from qtvit_cli import main

from .compare import same_end

pytestmark = pytest.mark.slow

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["qtvit.tasks.classify.train", "qtvit_cli"])
FSYNC = os.fsync

# 24 training images: three steps an epoch.
TRAIN = (
    "train classify --model qtvit_nano --img-size 16 --epochs 3 --batch-size 8 --bn-images 8 --num-threads 1 "
    "--model-args.drop_path_rate 0.2 --optim.drop-path-ramp true --model-args.drop_rate 0.1 --optim.loss bce "
    "--augment.auto-augment rand-m5-mstd1 --augment.random-erasing 0.3 --augment.train-sizes [12,20] "
    "--augment.mixup 0.4 --augment.cutmix 0.4 --ema.decay 0.9 --ema.warmup-steps 2 --ema.mesa-ratio 0.5"
)
EVERY_2_STEPS = "--checkpoint-every-steps 2"
MOMENTS = {
    "step": [(classify.Classifier, "training_step")],
    "evaluation": [(classify.Classifier, "validation_step")],
    "BatchNorm": [(EstimateBatchNorm, "on_validation_start")],
    "write": [(os, "fsync")],
    "rename": [(os, "replace")],
}
MOMENTS["any"] = list(itertools.chain.from_iterable(MOMENTS.values()))


def work(argv: Sequence[str], log: Path, kill: tuple[str, int] | None, file_bytes: int | None) -> None:
    """The command in a process of its own, which dies before the ``call``-th of the ``kill`` moments, and cannot write
    files of more than ``file_bytes``. Its report has no pictures, to save time.
    """
    multiprocessing.set_start_method("fork", force=True)  # its loaders' processes notice its end, the server's do not
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    job.plot_curves = classify.write_report = lambda *args: None
    if kill:
        _die_at(*kill)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.exit(main(argv))


def _die_at(where: str, call: int) -> None:
    calls = itertools.count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def die_or_call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                if function is FSYNC:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)  # not all has reached the disk
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return die_or_call

    for owner, name in MOMENTS[where]:
        setattr(owner, name, dying(getattr(owner, name)))


def run_process(
    argv: str, folder: Path, kill: tuple[str, int] | None = None, file_bytes: int | None = None
) -> tuple[int, str]:
    """The exit code of `work`, negative for a signal, and what it printed."""
    log = folder / "log.txt"
    process = CONTEXT.Process(target=work, args=(argv.split(), log, kill, file_bytes))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "photos"
    pack_folder(str(photos), out, shard_bytes=8192)
    return out


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    argv = f"{TRAIN} --data {photos} --num-workers 0 --output {folder / 'run'} {EVERY_2_STEPS}"
    code, log = run_process(argv, folder)
    assert code == 0, log
    return folder / "run"


def random_moments(seed: int, num: int) -> list[tuple[str, int]]:
    generator = random.Random(seed)
    return [("any", generator.randint(3, 14)) for _ in range(num)]


# The first run renames config.yaml, last.ckpt after step 2 and, after the epoch, best.safetensors, metrics.csv and
# last.ckpt. One that goes on renames two files for each checkpoint: the one before becomes previous.ckpt.
@pytest.mark.parametrize(
    ("kills", "workers", "is_packed"),
    [
        (
            [("rename", 3), ("rename", 2), ("rename", 4), ("step", 4), ("BatchNorm", 1), ("write", 1)],
            0,
            False,
        ),
        ([("step", 5)], 2, True),
        ([("step", 3)], 2, False),
        (random_moments(1, 3), 0, True),
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(
    kills: list[tuple[str, int]],
    workers: int,
    is_packed: bool,
    photos: Path,
    packed: Path,
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    argv = f"{TRAIN} --data {packed if is_packed else photos} --output {run} {EVERY_2_STEPS}"
    for kill in kills:
        code, log = run_process(f"{argv} --num-workers {workers}", tmp_path, kill)
        assert code == -signal.SIGKILL, log
        argv = f"train classify --resume {run}"
    code, log = run_process(f"{argv} --num-workers {workers}", tmp_path)
    assert code == 0, log
    same_end(run, uninterrupted)
    assert not list(run.glob(".*.tmp"))


def test_a_full_disk_costs_nothing_that_was_saved(photos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = f"{TRAIN} --data {photos} --num-workers 0 --output {run}"
    code, log = run_process(f"{argv}-none", tmp_path, file_bytes=500)
    assert code == 2
    assert log == f"qtvit: error: {run}-none/config.yaml: cannot be written (File too large)\n"
    code, log = run_process(argv, tmp_path, file_bytes=100_000)
    assert code == 2
    best = run / "best.safetensors"
    assert log.splitlines()[-1].startswith(f"qtvit: error: {best}: cannot be written (")
    assert "Traceback" not in log
    assert not run.exists()  # as nothing in it is of use

    code, log = run_process(f"{argv} {EVERY_2_STEPS}", tmp_path, ("step", 5))
    assert code == -signal.SIGKILL
    before = (run / LAST).read_bytes()
    resume = f"train classify --resume {run} --num-workers 0"
    code, log = run_process(resume, tmp_path, file_bytes=3_000_000)  # enough for the weights alone
    assert code == 2
    assert log.splitlines()[-1].startswith(f"qtvit: error: {run / LAST} cannot be written (File too large); the check")
    assert "Traceback" not in log
    assert (run / LAST).read_bytes() == before
    assert not list(run.glob(".*.tmp"))
    code, log = run_process(resume, tmp_path)
    assert code == 0, log
    same_end(run, uninterrupted)
