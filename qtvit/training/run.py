"""What runs of every task share: the run folder, processes and threads, the Lightning trainer."""

import itertools
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from qtvit import console
from qtvit.checkpoints import BEST
from qtvit.device import num_cores, processes
from qtvit.files import open_folder

from .callbacks import LAST, PREVIOUS, CheckpointFiles, ProgressBar
from .config import TrainConfig
from .finite import BAD_BATCH


def create_run_folder(output: str | None, default_name: str) -> Path:
    """A new folder: ``output``, or runs/``default_name`` with a number when that is taken.

    Raises:
        ValueError: ``output`` exists and is not empty.
        OSError: it cannot be written to.
    """
    if output is not None:
        run = Path(output)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"--output {run} exists already and is not empty; name another folder")
        return open_folder(run)
    name = re.sub(r"[^\w.-]+", "-", default_name)
    for number in itertools.count(1):
        run = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            return open_folder(run, exist_ok=False)
        except FileExistsError:
            continue
    raise AssertionError("the numbers do not end")


def default_workers(in_memory: bool) -> int:
    """Processes to load images with: one per core of this process's share less one, at most 8; none for data that is in
    memory already.
    """
    cores = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if in_memory else min(8, max(cores - 1, 1))


def set_threads(num_threads: int | None, num_workers: int) -> None:
    """CPU threads of the network: as given, as OMP_NUM_THREADS says, or the cores that the workers leave."""
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads or max(num_cores() - num_workers, 1))


def check_device(config: TrainConfig, device: torch.device) -> None:
    """ValueError for options that ``device`` cannot do."""
    if device.type != "cuda":
        if config.precision == "16-mixed":
            raise ValueError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
        if config.sync_bn:
            raise ValueError("--sync-bn needs GPUs; torch has no synchronised BatchNorm for the CPU")
    if device.index is not None and processes()[1] > 1:
        raise ValueError(f"--device {device} under torchrun: each process has its own; give --device {device.type}")


@contextmanager
def open_run(config: TrainConfig, default_name: str) -> Iterator[Path]:
    """The run folder, new or that of ``config.resume``, for this run alone. Only the first process makes and locks it.

    A new one does not outlive an error that comes before anything worth keeping is saved.

    Raises:
        ValueError: another run has it, or ``config.output`` exists.
        OSError: it cannot be written to.
    """
    if processes()[0] > 0:
        yield Path(config.resume or config.output or "runs")
        return
    run = Path(config.resume) if config.resume else create_run_folder(config.output, default_name)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{run}: another process is training in this run folder") from None
    try:
        with nullcontext() if config.resume else clean_up(run):
            yield run
    finally:
        lock.release()


@contextmanager
def clean_up(run: Path) -> Iterator[None]:
    """After an error before anything worth keeping is saved, the run folder is removed: nothing can go on from it."""
    try:
        yield
    except BaseException:
        if not any(any(run.glob(name)) for name in (LAST, PREVIOUS, BEST, BAD_BATCH.format("*"))):
            shutil.rmtree(run, ignore_errors=True)
        raise


def find_state(run: Path, world_size: int = 1) -> tuple[Path | None, dict[str, Any]]:
    """The newest undamaged training state in ``run``: its file and the description that `SaveState` put there.

    A run that was killed before it saved anything has none, and starts from the beginning: (None, {}).

    Raises:
        ValueError: all states that are there are damaged, or of another number of processes.
    """
    found = [run / name for name in (LAST, PREVIOUS) if (run / name).is_file()]
    if not found:
        console.say(f"{run}: no {LAST} in this folder; starting from the beginning")
        return None, {}
    damaged: list[Path] = []
    for path in found:
        try:
            description = CheckpointFiles().load_checkpoint(path)["qtvit"]
        except Exception as error:  # torch raises nearly anything for a damaged file
            console.say(f"{path} is damaged ({type(error).__name__}); trying the checkpoint before it")
            damaged.append(path)
            continue
        if description["world_size"] != world_size:
            before = description["world_size"]
            raise ValueError(
                f"{run} was training in {before} process{'es' * (before != 1)}, not {world_size}; "
                f"torchrun --nproc-per-node sets their number"
            )
        if processes()[0] == 0:
            for other in damaged:  # or the next one to be saved would put it in the place of the good one
                other.replace(other.with_suffix(".damaged"))
        return path, description
    raise ValueError(f"{run}: {' and '.join(path.name for path in found)} cannot be read")


def build_trainer(
    config: TrainConfig, device: torch.device, run: Path, callbacks: list[Callback], **options: Any
) -> lightning.Trainer:
    """Lightning's trainer with logs, checkpoints and progress in ``run``."""
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    lightnings = ("does not have many workers", "exists and is not empty", "LeafSpec", "not resumable", "in eval mode")
    for known in (*lightnings, "sync_dist=True", "all_gather is deprecated", "`__len__` defined"):
        warnings.filterwarnings("ignore", message=f".*{known}")
    interactive = sys.stderr.isatty() and not console.is_quiet()
    world_size, local = processes()[1], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return lightning.Trainer(
        accelerator=device.type,
        devices=local if device.index is None else [device.index],
        num_nodes=world_size // local,
        strategy="ddp" if world_size > 1 else "auto",
        sync_batchnorm=config.sync_bn,
        accumulate_grad_batches=config.accumulate,
        precision=config.precision,
        max_epochs=config.epochs,
        gradient_clip_val=config.optim.grad_clip,
        gradient_clip_algorithm="value",
        callbacks=[*callbacks, ProgressBar(leave=False)] if interactive else callbacks,
        logger=TensorBoardLogger(run, name="", version="tensorboard"),
        plugins=[CheckpointFiles()],
        enable_checkpointing=False,
        enable_progress_bar=interactive,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **options,
    )
