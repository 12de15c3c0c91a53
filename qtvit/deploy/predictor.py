"""From pictures to what a model makes of them."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from PIL import Image
from torch import nn

from qtvit import tasks
from qtvit.checkpoints import ModelInfo, load_model
from qtvit.checkpoints.model_file import check_task
from qtvit.data import ImageSource, class_names, open_image
from qtvit.device import resolve_device

from .artifact import format_of
from .runtimes import FusedNetwork, Network, Runtime, open_exported

DECODERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that read images ahead; PIL decodes and resizes without Python's lock."""

P = TypeVar("P")
T = TypeVar("T")
OfTask = TypeVar("OfTask", bound="Predictor[Any]")


class Predictor(ABC, Generic[P]):
    """A trained model with its classes and preprocessing, in whatever runs it: from pictures to ``P``.

    Args:
        model: the network, which runs as it is, or what runs it.
        info: its description.
        device: where the network runs, see `qtvit.device.resolve_device`; a runtime has its own.
        threads: of the CPU that the network may use; None leaves PyTorch's number.

    Attributes:
        runtime: what runs the network.
        classes: readable names (`qtvit.data.class_names`) in the order of the outputs.

    Raises:
        ValueError: the model has no classes, or is not for RGB images.
    """

    task: ClassVar[str]
    """As in ``qtvit train TASK``."""

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        if not info.classes:
            raise ValueError(f"this {info.model} has no classifier; `qtvit train classify --checkpoint` can add one")
        if (in_chans := info.model_args.get("in_chans", 3)) != 3:
            raise ValueError(f"this {info.model} is for images of {in_chans} channels, and images are read as RGB")
        self.runtime = model if isinstance(model, Runtime) else Network(model, resolve_device(device), threads)
        self.info = info
        self.classes = class_names(info.classes)

    @classmethod
    def load(cls: type[OfTask], path: str | Path, device: str = "auto", threads: int | None = None) -> OfTask:
        """The model of a run folder, model file or weights file, fused, or an exported one (.onnx, .xml, .pt2).

        Called on `Predictor` itself, it returns that of the model's task.

        Raises:
            FileNotFoundError, ValueError: as `qtvit.checkpoints.load_model` and `qtvit.deploy.runtimes.Exported`; or
                the model is for another task than this class.
            ModuleNotFoundError: what runs the exported file is not installed.
        """
        runtime: Runtime
        if format_of(path):
            runtime = exported = open_exported(path, device, threads)
            info = exported.artifact.info
        else:
            model, info = load_model(path)
            runtime = FusedNetwork(model, resolve_device(device), threads)
        predictor = tasks.get(info.task).load("predictor")
        if not issubclass(predictor, cls):
            check_task(path, info, cls.task)
        made: OfTask = predictor(runtime, info)
        return made

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.runtime.device

    @property
    def model(self) -> nn.Module:
        """The PyTorch network as it was trained; ValueError for an exported file, which has none."""
        if isinstance(self.runtime, Network):
            return self.runtime.module
        raise ValueError("an exported model has no layers to look into; give the run it was exported from")

    def close(self) -> None:
        """Free what the runtime holds; it cannot predict any more."""
        self.runtime.close()

    @overload
    def predict(self, images: ImageSource, *args: Any, **options: Any) -> P: ...
    @overload
    def predict(self, images: list[ImageSource] | list[str] | list[Path], *args: Any, **options: Any) -> list[P]: ...
    def predict(
        self, images: ImageSource | list[ImageSource] | list[str] | list[Path], *args: Any, **options: Any
    ) -> P | list[P]:
        """The ``P`` of an image (see `qtvit.data.open_image`), or a list of those of a list of images.

        The arguments are those of `iter_predict`.

        Raises:
            FileNotFoundError, ValueError: an image that is not there or cannot be read; as `iter_predict`.
        """
        if isinstance(images, (list, tuple)):
            return list(self.iter_predict(images, *args, **options))
        return next(self.iter_predict([images], *args, **options))

    @abstractmethod
    def iter_predict(self, images: Sequence[ImageSource], *args: Any, **options: Any) -> Iterator[Any]:
        """The ``P`` of each image, one at a time; options differ by task.

        With ``skip_broken=True``, None for an image that cannot be read.
        """

    def _iterate(
        self,
        images: Sequence[ImageSource],
        batch_size: int,
        skip_broken: bool,
        prepare: Callable[[Image.Image], T],
        run: Callable[[list[T]], list[P]],
    ) -> Iterator[P | None]:
        """What ``run`` makes of each image, in batches of what ``prepare`` makes of them.

        While a batch is in the network, threads read the next ones. With ``skip_broken``, None for an image that cannot
        be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        ahead = _read_ahead(images, prepare, 2 * batch_size, skip_broken)
        while batch := list(islice(ahead, batch_size)):
            readable = [item for item in batch if item is not None]
            found = iter(run(readable) if readable else [])
            yield from (None if item is None else next(found) for item in batch)


def _read_ahead(
    images: Sequence[ImageSource], prepare: Callable[[Image.Image], T], num_ahead: int, skip_broken: bool
) -> Iterator[T | None]:
    """What ``prepare`` makes of each image, in order, while threads read up to ``num_ahead`` images further on."""

    def read(image: ImageSource) -> T | None:
        try:
            return prepare(open_image(image))
        except (ValueError, OSError):
            if not skip_broken:
                raise
            return None

    pool = ThreadPoolExecutor(min(DECODERS, len(images)) or 1, thread_name_prefix="qtvit-read")
    waiting: deque[Future[T | None]] = deque()
    try:
        for image in images:
            waiting.append(pool.submit(read, image))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
