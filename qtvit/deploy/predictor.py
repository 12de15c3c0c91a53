"""Predicting with a trained model: the base class of the tasks' predictors."""

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
from .runtimes import Network, Runtime, open_exported

DECODERS = max(2, min(8, os.cpu_count() or 1))
"""Largest number of threads that read images ahead; PIL releases Python's lock while it decodes and resizes."""

P = TypeVar("P")
T = TypeVar("T")
OfTask = TypeVar("OfTask", bound="Predictor[Any]")


class Predictor(ABC, Generic[P]):
    """A trained model with its classes and preprocessing; turns images into predictions of type ``P``.

    Args:
        model: the network, which runs as it is (not fused), or a runtime.
        info: its description.
        device, threads: where the network runs (`qtvit.device.resolve_device`) and on how many CPU threads, None for
            PyTorch's number; a runtime has its own.

    Attributes:
        runtime: runs the network.
        info: the model's description.
        classes: readable names (`qtvit.data.class_names`) in the order of the outputs.

    Raises:
        ValueError: the model has no classes, or does not take RGB images.
    """

    task: ClassVar[str]
    """Name in the registry of tasks."""

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
        """Load an exported file (.onnx, .xml, .pt2), or, fused, what `qtvit.checkpoints.load_model` takes.

        ``Predictor.load`` returns the predictor of the model's task.

        Raises:
            FileNotFoundError, ValueError: as `qtvit.checkpoints.load_model` and `qtvit.deploy.runtimes.Exported`; or
                the model is for another task than this class.
            ModuleNotFoundError: the runtime of the exported file is not installed.
        """
        runtime: Runtime
        if format_of(path):
            runtime = exported = open_exported(path, device, threads)
            info = exported.artifact.info
        else:
            model, info = load_model(path)
            runtime = Network(model, resolve_device(device), threads, fused=True)
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
        """Release the runtime's memory; no prediction is possible afterwards."""
        self.runtime.close()

    @overload
    def predict(self, images: ImageSource, *args: Any, **options: Any) -> P: ...
    @overload
    def predict(self, images: list[ImageSource] | list[str] | list[Path], *args: Any, **options: Any) -> list[P]: ...
    def predict(
        self, images: ImageSource | list[ImageSource] | list[str] | list[Path], *args: Any, **options: Any
    ) -> P | list[P]:
        """The prediction for one image, or a list of them for a list of images; images as `qtvit.data.open_image`.

        Further arguments are those of `iter_predict`.

        Raises:
            FileNotFoundError, ValueError: an image does not exist or cannot be read; as `iter_predict`.
        """
        if isinstance(images, (list, tuple)):
            return list(self.iter_predict(images, *args, **options))
        return next(self.iter_predict([images], *args, **options))

    @abstractmethod
    def iter_predict(self, images: Sequence[ImageSource], *args: Any, **options: Any) -> Iterator[Any]:
        """Yield the prediction for each image; options differ by task.

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
        """Yield the prediction for each image: ``prepare`` per image in threads, ``run`` per batch of its results.

        While the network runs a batch, threads read the next ones. With ``skip_broken``, None for an image that cannot
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
    """Yield ``prepare`` of each image in order, while threads read up to ``num_ahead`` images ahead."""

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
