"""Training in two processes that torchrun starts, with torch's gloo backend on the CPU."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import qtvit
from qtvit.training.callbacks import LAST
from qtvit_cli import main
from tests.tasks.segment.masks import draw_masks

from .compare import same_end
from .conftest import COLORS, draw

pytestmark = pytest.mark.slow

TINY = "train classify --model qtvit_nano --img-size 16 --data {data} --num-threads 1 --num-workers 0"
AUGMENTED = "--augment.auto-augment rand-m5-mstd1 --augment.random-erasing 0.3"
# Batches of 2 x 4 are batches of 8 but for the BatchNorm statistics and what is drawn anew in each process.
SAME = f"{TINY} {AUGMENTED} --epochs 2 --freeze-bn true --bn-images 0"
# So small a learning rate leaves the weights as they are.
STILL = f"{TINY} {AUGMENTED} --epochs 1 --batch-size 4 --lr 1e-30 --bn-images 16 --ema.decay 0.5"
# 24 training images: three steps an epoch.
WHOLE = (
    f"{TINY} {AUGMENTED} --epochs 3 --batch-size 4 --bn-images 8 --checkpoint-every-steps 2 --augment.mixup 0.4 "
    "--model-args.drop_path_rate 0.2 --model-args.drop_rate 0.1 --optim.drop-path-ramp true --augment.cutmix 0.4 "
    "--augment.train-sizes [12,20] --ema.decay 0.9 --ema.warmup-steps 2 --ema.mesa-ratio 0.5"
)

SEGMENT = (
    "train segment --model qtvit_nano --head light --crop-size 16 --data {data} --num-threads 1 --num-workers 0 "
    "--epochs 1 --freeze-bn true --bn-images 0 --drop-rate 0 --augment.scale [1,1]"
)


@dataclass
class Launches:
    """What several starts of torchrun left and printed.

    Attributes:
        folder: with the runs.
        out, err: of each start.
    """

    folder: Path
    out: list[str]
    err: list[str]


def torchrun(folder: Path, *commands: tuple[str, tuple[str, int] | None]) -> tuple[str, str]:
    """What two processes that run ``commands`` (see commands.py) print, to stdout and stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, str(Path(__file__).with_name("commands.py")), json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=900)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight training images each, and eleven held-out images."""
    root = tmp_path_factory.mktemp("data") / "boxes"
    for name, color in COLORS.items():
        for i in range(12):
            draw(root / ("train" if i < 8 else "val") / name / f"{i}.png", tuple(value + 3 * i for value in color), i)
    (root / "val" / "red" / "11.png").unlink()
    return root


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with masks to train on, and three held out; a mean over some has as many pixels as over others."""
    return draw_masks(tmp_path_factory.mktemp("data") / "boxes", num_train=4, num_val=3, num_ignored=0)


@pytest.fixture(scope="module")
def alone(data: Path, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs "same" and "still" of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(f"{SAME} --batch-size 8 --lr 1e-3 --output {folder / 'same'}".format(data=data).split()) == 0
    assert main(f"{STILL} --output {folder / 'still'}".format(data=data).split()) == 0
    segment = f"{SEGMENT} --batch-size 4 --lr 1e-3 --output {folder / 'segment'}"
    assert main(segment.format(data=masks).split()) == 0
    return folder


@pytest.fixture(scope="module")
def launches(data: Path, masks: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    folder = tmp_path_factory.mktemp("together")
    whole = WHOLE.format(data=data)
    printed = [
        torchrun(
            folder,
            (f"{SAME} --batch-size 4 --lr 5e-4 --output same".format(data=data), None),
            (STILL.format(data=data), None),
            (f"{SEGMENT} --batch-size 2 --lr 5e-4 --output segment".format(data=masks), None),
            (f"{TINY} --batch-size 13".format(data=data), None),
            (f"train classify --resume {alone / 'same'}", None),
            (f"{whole} --output whole", None),
            (f"{whole} --output killed", ("die", 5)),
        ),
        torchrun(
            folder,
            ("train classify --resume killed --num-workers 1", None),
            (f"{whole} --output stopped", ("interrupt", 4)),
        ),
        torchrun(folder, ("train classify --resume stopped", None)),
    ]
    out, err = zip(*printed, strict=True)
    print(*out, *err)  # for the report of a failure
    return Launches(folder, list(out), list(err))


def read_metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_two_processes_take_the_steps_of_one(launches: Launches, alone: Path) -> None:
    one, two = (torch.load(folder / "same" / LAST)["state_dict"] for folder in (alone, launches.folder))
    for name in one:  # the steps add up to 2e-3; the order of sums makes 1e-7
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*(read_metrics(folder / "same") for folder in (launches.folder, alone)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_segment_as_one(launches: Launches, alone: Path) -> None:
    one, two = (torch.load(folder / "segment" / LAST)["state_dict"] for folder in (alone, launches.folder))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    scores = [json.loads((folder / "segment" / "scores.json").read_text()) for folder in (launches.folder, alone)]
    assert scores[0] == scores[1]
    ours, theirs = (read_metrics(folder / "segment")[0] for folder in (launches.folder, alone))
    assert {name: ours[name] for name in ours if name.startswith("val/")} == pytest.approx(
        {name: theirs[name] for name in theirs if name.startswith("val/")}
    )


def test_two_processes_estimate_and_evaluate_as_one(launches: Launches, alone: Path) -> None:
    [run] = (launches.folder / "runs").iterdir()  # which one process has made, once
    one, two = (qtvit.load(folder) for folder in (alone / "still", run))
    assert two.info.metrics == pytest.approx(one.info.metrics, rel=1e-5)
    statistics = two.model.state_dict()
    for name, tensor in one.model.state_dict().items():
        if tensor.is_floating_point():  # not the numbers of batches, which each process counts for itself
            torch.testing.assert_close(statistics[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", ["killed", "stopped"])
def test_a_run_that_ended_early_goes_on_to_the_same_end(run: str, launches: Launches) -> None:
    same_end(launches.folder / run, launches.folder / "whole")


def test_one_process_speaks(launches: Launches, alone: Path) -> None:
    mistakes = [line for line in launches.err[0].splitlines() if line.startswith("qtvit")]
    assert mistakes == [
        "qtvit: error: --batch-size 13 in each of 2 processes is more than the 24 training images",
        f"qtvit: error: {alone / 'same'} was training in 1 process, not 2; torchrun --nproc-per-node sets their number",
    ]
    assert launches.out[0].count("epoch 1/2") == 1
    assert launches.out[0].count("exit code 2") == 2
    assert "press Ctrl-C again" in launches.out[1]
    assert launches.err[1].count("stopped; to go on:  torchrun … -m qtvit train classify --resume stopped\n") == 1
    assert launches.err[2] == ""


def test_the_number_of_processes_cannot_change(launches: Launches, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "classify", "--resume", str(launches.folder / "whole")]) == 2
    assert "whole was training in 2 processes, not 1; torchrun --nproc-per-node" in capsys.readouterr().err
