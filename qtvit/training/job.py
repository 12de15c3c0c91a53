"""The training of any task, from configuration to run folder."""

import json
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn
from torch.utils.data import DataLoader, Dataset

from qtvit import console, tasks
from qtvit.checkpoints import BEST, WEIGHT_SOURCES, ModelInfo
from qtvit.data import DIGITS
from qtvit.data.sampling import EpochBatches, SeededDataset, StreamBatches, even_batches, fixed_keys
from qtvit.device import ignore_interrupts, keep_freed_memory, processes, resolve_device
from qtvit.errors import some
from qtvit.files import write_text

from .callbacks import EpochLines, EstimateBatchNorm, EvaluateEvery, History, SaveBest, SaveState
from .config import TrainConfig
from .finite import StopAtNonFinite
from .options import absolute, save_config
from .plots import plot_curves
from .run import build_trainer, check_device, default_workers, find_state, open_run, set_threads
from .task import Task

SUMMARY = "summary.json"
"""Written last: a run that has it is complete."""

C = TypeVar("C", bound=TrainConfig)
S = TypeVar("S", bound="Summary")


@dataclass(frozen=True)
class Loaders:
    """What a task reads.

    Attributes:
        batches: of the training images: which come when.
        train: their loader.
        val: the loader of the held-out images.
        bn: of those that the BatchNorm statistics are estimated on; None to keep the running averages.
    """

    batches: EpochBatches | StreamBatches
    train: DataLoader
    val: DataLoader
    bn: Iterable[Any] | None


@dataclass(frozen=True)
class Speed:
    """How long training took.

    Attributes:
        seconds: wall-clock time of the training loop.
        seconds_per_batch: time of a training step alone; 0 if none was measured.
        batch_size: images per step, in all processes.
    """

    seconds: float
    seconds_per_batch: float
    batch_size: int

    def summary(self) -> dict[str, Any]:
        """The fields train_seconds and train_images_per_second of a `Summary`; the latter None if not measured."""
        images_per_second = round(self.batch_size / self.seconds_per_batch, 1) if self.seconds_per_batch else None
        return {"train_seconds": round(self.seconds, 1), "train_images_per_second": images_per_second}


@dataclass(frozen=True)
class Summary(ABC):
    """What a finished run has to say; written as `SUMMARY`.

    Attributes:
        run: the run folder.
    """

    run: str

    @abstractmethod
    def lines(self) -> list[tuple[str, str]]:
        """The rest in words: what, and how much."""


class Data(Protocol):
    """What a task trains on."""

    @property
    def name(self) -> str:
        """For the run folder's name."""

    @property
    def train(self) -> Sized:
        """The training samples."""

    @property
    def val(self) -> Sized:
        """The held-out samples."""

    def digest(self) -> str:
        """A hash of everything that training depends on, wherever the data are."""


class Job(ABC, Generic[C, S]):
    """What a task adds to `run_job`: its data, network, training step and report. An instance is ready to be trained.

    Args:
        config: the run's.
        device: to train on.
        past: the description of the run that goes on, as `run.find_state` returns it; empty for a new run.

    Attributes:
        config: the run's, with ``model`` and ``num_workers`` filled in.
        data: what `read_data` returned.
        info: the description of the model to save.
        task: the network in training.
        loaders: of the images.
        sources: names of the training images, by index.
        about: in words, what is trained on.
        description: data and settings besides the data's digest by which a run that goes on knows that they are the
            same.
        scored_first: whether the network is evaluated before the first step too.

    Raises:
        FileNotFoundError, ValueError: data, model or checkpoint that are not there or do not fit; a run that goes on
            with other data.
    """

    monitor: ClassVar[str]
    """The held-out score, the higher the better, that decides which weights are best."""
    score: ClassVar[str]
    """What to call it."""
    columns: ClassVar[Mapping[str, str]]
    """What to say of an epoch: names of metrics, with a text that has a place for the number."""
    curves: ClassVar[Mapping[str, Mapping[str, str]]]
    """Panels of the picture of the training curves, see `qtvit.training.plots.plot_curves`."""
    changes: ClassVar[str] = "images were added or removed"
    """What may have happened to data that are not those of the run that goes on."""

    config: C
    data: Any
    info: ModelInfo
    task: Task
    loaders: Loaders
    sources: Sequence[object]
    about: str
    scored_first: bool = False

    def __init__(self, config: C, device: torch.device, past: dict[str, Any]) -> None:
        self.data = data = self.read_data(config)
        check_counts(config, len(data.train), len(data.val))
        if past and data.digest() != past["data"]:
            raise ValueError(f"{config.data} is not what {config.resume} was training on: {self.changes}")
        self.description: dict[str, Any] = {"data": data.digest()}
        config = with_workers(config, config.data == DIGITS)
        if past:  # its training state holds the weights
            self.info = info = ModelInfo(**past["info"])
            model = tasks.get(info.task).load("build")(info.model, info.model_args, info.task_args)
        else:
            warn_of_random_weights(config)
            model, self.info = self.build(config, data)
        self.config = replace(config, model=self.info.model)
        self.set_up(model.train(), device, past)

    @abstractmethod
    def read_data(self, config: C) -> Data:
        """Read what to train on."""

    @abstractmethod
    def build(self, config: C, data: Any) -> tuple[nn.Module, ModelInfo]:
        """The network to train, from random weights or from ``config.checkpoint``, and its description."""

    @abstractmethod
    def set_up(self, model: Any, device: torch.device, past: dict[str, Any]) -> None:
        """Set ``task``, ``loaders``, ``sources`` and ``about``; everything else is set already."""

    @abstractmethod
    def resolved(self) -> dict[str, Any]:
        """Options that ``config`` left open, as they were found, so that it repeats the run from anywhere."""

    @abstractmethod
    def report(self, run: Path, speed: Speed) -> S:
        """Score the best weights, draw the pictures and write the tables."""


def warn_of_random_weights(config: TrainConfig) -> None:
    """Say so if weights are kept that nobody has trained."""
    if config.checkpoint is None and not config.model_args.keys() & set(WEIGHT_SOURCES):
        for option, on in ((f"--freeze {config.freeze}", config.freeze), ("--freeze-bn", config.freeze_bn)):
            if on:
                console.say(f"{option} without --checkpoint keeps random weights as they are")


def check_model(config: TrainConfig, source: ModelInfo) -> None:
    """ValueError if ``config`` names another model than its checkpoint holds."""
    if config.model not in (None, source.model):
        raise ValueError(f"--checkpoint {config.checkpoint} holds {source.model}, not {config.model}")


def say_new_classifier(config: TrainConfig, source: ModelInfo, classes: Sequence[str]) -> None:
    """Say that the outputs of a checkpoint with other classes are not taken over."""
    console.say(
        f"{config.checkpoint} tells {len(source.classes)} other classes apart ({some(source.classes)}): "
        f"its classifier starts anew for {some(classes)}"
    )


def normalisation(model: str, source: ModelInfo | None) -> dict[str, list[float]]:
    """Mean and standard deviation, of RGB from 0 to 1, that a network is used to: as its checkpoint says, or timm."""
    given: Mapping[str, Any]
    if source is None:
        cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
        given = resolve_data_config(pretrained_cfg=(cfg or PretrainedCfg()).to_dict())
    else:
        given = source.preprocess if "mean" in source.preprocess else source.task_args
    return {"mean": list(given["mean"]), "std": list(given["std"])}


def train(config: C) -> Any:
    """Train as ``config`` says, whatever its task; see `run_job`."""
    return run_job(config, tasks.get(config.task).load("job"))


def run_job(config: C, make: Callable[[C, torch.device, dict[str, Any]], Job[C, S]]) -> S | None:
    """Train as ``config`` says, and leave in the run folder the model file, logs, curves, scores and pictures.

    Under ``torchrun``, every process calls this; the first one writes, and gets the summary.

    Raises:
        FileNotFoundError, ValueError: data, model, device, checkpoint or run that are not there or do not fit.
        FloatingPointError: a loss or gradient is not finite.
        Interrupted: the user pressed Ctrl-C; a KeyboardInterrupt that says how to go on.
    """
    device = resolve_device(config.device)
    check_device(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    rank, world_size = processes()
    state, past = find_state(Path(config.resume), world_size) if config.resume else (None, {})
    finished = past.get("finished", False)
    if finished and (Path(config.resume or "") / SUMMARY).is_file():
        raise ValueError(f"{config.resume} is finished; --checkpoint {config.resume} starts a new run from its weights")
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    job = make(config, device, past)
    config, task, loaders = job.config, job.task, job.loaders

    with open_run(config, f"{config.model}-{job.data.name}") as run:
        if not past and rank == 0:
            save_config(_resolved(job, device), run / "config.yaml")
        together = f", {world_size} processes" if world_size > 1 else ""
        console.say(f"Training {config.model} on {job.about}, on {device}{together}.\nRun folder: {run}")
        history = History(run / "metrics.csv")
        callbacks: list[Callback] = [EvaluateEvery(config.eval_every), SaveBest(run / BEST, job.info, job.monitor)]
        callbacks.append(StopAtNonFinite(run, loaders.batches, job.sources))
        if loaders.bn is not None:
            callbacks.append(EstimateBatchNorm(loaders.bn))
        if config.early_stopping:
            callbacks.append(
                EarlyStopping(job.monitor, mode="max", patience=config.early_stopping, check_on_train_epoch_end=False)
            )
        description = {**job.description, "info": asdict(job.info), "world_size": world_size}
        save_state = SaveState(run, loaders.batches, history, description, config.checkpoint_every_steps)
        callbacks += [history, save_state, EpochLines(history, job.columns)]
        if not finished:  # else only its report is missing
            with warnings.catch_warnings(), save_state.listening(f"train {config.task}"):
                if job.scored_first and not past:
                    history.rows.append(_score_start(job, device, run))
                trainer = build_trainer(config, device, run, callbacks)
                trainer.fit(task, loaders.train, loaders.val, ckpt_path=state)
            if trainer.current_epoch < config.epochs:
                s = "s" * (config.early_stopping != 1)
                console.say(f"stopped early: no better {job.score} in {config.early_stopping} evaluation{s}")
        if rank > 0:
            return None
        if finished:
            speed = Speed(past["seconds"], past.get("seconds_per_batch", 0.0), config.batch_size * world_size)
        else:
            speed = Speed(history.seconds, history.seconds_per_batch, config.batch_size * world_size)
        plot_curves(run / "metrics.csv", run / "curves.png", job.curves)
        summary = job.report(run, speed)
        write_text(run / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
        return summary


def _resolved(job: Job[C, Any], device: torch.device) -> C:
    """The configuration that repeats the run from anywhere."""
    config = job.config
    return replace(
        config,
        data=config.data if config.data == DIGITS else absolute(config.data) or config.data,
        checkpoint=absolute(config.checkpoint),
        output=None,
        resume=None,
        device=str(device),
        num_threads=torch.get_num_threads(),
        **job.resolved(),
    )


def _score_start(job: Job[Any, Any], device: torch.device, run: Path) -> dict[str, float]:
    """The scores before the first step, as a row of `History`."""
    loaders = job.loaders
    callbacks: list[Callback] = [] if loaders.bn is None else [EstimateBatchNorm(loaders.bn)]
    trainer = build_trainer(job.config, device, run, callbacks, inference_mode=False)  # as within training
    [scores] = trainer.validate(job.task, loaders.val, verbose=False)
    values = "  ".join(text.format(scores[name]) for name, text in job.columns.items() if name in scores)
    console.say(f"epoch 0/{job.config.epochs}  {values}  (before the first step)")
    return {"epoch": 0, "step": 0, **scores}


def check_counts(config: TrainConfig, num_train: int, num_val: int) -> None:
    """ValueError if there are too few images for the batches and processes."""
    world_size = processes()[1]
    if config.batch_size * world_size > num_train:
        times = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(f"--batch-size {config.batch_size}{times} is more than the {num_train} training images")
    if num_val < world_size:
        raise ValueError(f"{num_val} held-out images are fewer than the {world_size} processes")


def with_workers(config: C, in_memory: bool = False) -> C:
    """``config`` with the number of loader processes filled in; the threads that these leave are set."""
    if config.num_workers is None:
        config = replace(config, num_workers=default_workers(in_memory))
    set_threads(config.num_threads, config.num_workers or 0)
    return config


def loader_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What all data loaders have in common."""
    return {
        "num_workers": config.num_workers or 0,
        "worker_init_fn": ignore_interrupts,
        "pin_memory": device.type == "cuda",
    }


def bn_plan(config: TrainConfig, num_train: int) -> tuple[int, int]:
    """Images per batch and process, and batches per process, of the estimation of BatchNorm statistics."""
    world_size = processes()[1]
    size = min(config.bn_batch_size or config.batch_size, num_train // world_size)
    return size, max(min(config.bn_images, num_train) // (size * world_size), 1)


def make_loaders(
    config: TrainConfig,
    device: torch.device,
    train: Sequence[Dataset[Any]],
    num_train: int,
    val: Dataset[Any],
    num_val: int,
    collate: Callable[[list[Any]], Any] | None = None,
    val_batch_size: int | None = None,
    val_collate: Callable[[list[Any]], Any] | None = None,
) -> Loaders:
    """The loaders of images that can be read by position.

    Args:
        config: of the run.
        device: to train on.
        train: the training images, in the size of the evaluation and then in each of the config's other sizes.
        num_train, num_val: numbers of images.
        val: the held-out images.
        collate: makes a batch of samples; None: torch's way.
        val_batch_size: of held-out images; None: that of training.
        val_collate: as ``collate``, of held-out images; None: that of training.
    """
    rank, world_size = processes()
    share: dict[str, Any] = {"rank": rank, "world_size": world_size}
    common = {**loader_options(config, device), "collate_fn": collate}
    batches = EpochBatches(num_train, config.batch_size, config.seed, num_sizes=config.num_sizes, **share)
    train_set = SeededDataset(train, config.seed)
    size, num_batches = bn_plan(config, num_train)
    num_images = num_batches * world_size * size
    keys = fixed_keys(random.Random(config.seed).sample(range(num_train), num_images))
    bn_batches = [keys[i : i + size] for i in range(rank * size, num_images, world_size * size)]
    val_batches = even_batches(num_val, val_batch_size or config.batch_size, **share)
    return Loaders(
        batches,
        DataLoader(train_set, batch_sampler=batches, persistent_workers=common["num_workers"] > 0, **common),
        DataLoader(val, batch_sampler=val_batches, **{**common, "collate_fn": val_collate or collate}),
        DataLoader(train_set, batch_sampler=bn_batches, **common) if config.bn_images else None,
    )
