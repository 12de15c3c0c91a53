"""From pictures to what a model makes of them."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo, load_model
from qtvit.checkpoints.model_file import check_task
from qtvit.data import ImageSource, Preprocess, class_names, open_image
from qtvit.device import resolve_device

from .artifact import format_of
from .runtimes import FusedNetwork, Network, Runtime, open_exported

DECODERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that read images ahead; PIL decodes and resizes without Python's lock."""

P = TypeVar("P")
T = TypeVar("T")
OfTask = TypeVar("OfTask", bound="Predictor[Any]")


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, most probable first.

    Attributes:
        labels: class names.
        probabilities: softmax outputs, in the same order.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """The probability of `label`."""
        return self.probabilities[0]

    def __str__(self) -> str:
        return ", ".join(f"{name} {p:.1%}" for name, p in zip(self.labels, self.probabilities, strict=True))


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
        fitting = [found for found in (cls, *cls.__subclasses__()) if getattr(found, "task", None) == info.task]
        if not fitting:
            check_task(path, info, cls.task)
        return fitting[0](runtime, info)

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

    @abstractmethod
    def predict(self, images: Any, *args: Any, **options: Any) -> Any:
        """The ``P`` of an image, or a list of those of a list of images; options differ by task."""

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


class ClassPredictor(Predictor[Prediction]):
    """A trained classifier, see `Predictor`.

    Attributes:
        preprocess: its evaluation protocol.
    """

    task = "classify"

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(model, info, device, threads)
        self.preprocess = Preprocess(**info.preprocess)

    @overload
    def predict(self, images: ImageSource, top_k: int = 5, batch_size: int = 32) -> Prediction: ...
    @overload
    def predict(
        self, images: list[ImageSource] | list[str] | list[Path], top_k: int = 5, batch_size: int = 32
    ) -> list[Prediction]: ...
    def predict(
        self, images: ImageSource | list[ImageSource] | list[str] | list[Path], top_k: int = 5, batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """The ``top_k`` most probable classes of an image, or of each image of a list.

        Raises:
            FileNotFoundError, ValueError: an image that is not there or cannot be read (see `qtvit.data.open_image`).
        """
        if isinstance(images, (list, tuple)):
            return list(self.iter_predict(images, top_k, batch_size))
        return next(self.iter_predict([images], top_k))

    @overload
    def iter_predict(
        self, images: Sequence[ImageSource], top_k: int = 5, batch_size: int = 32
    ) -> Iterator[Prediction]: ...
    @overload
    def iter_predict(
        self, images: Sequence[ImageSource], top_k: int = 5, batch_size: int = 32, *, skip_broken: bool
    ) -> Iterator[Prediction | None]: ...
    def iter_predict(
        self, images: Sequence[ImageSource], top_k: int = 5, batch_size: int = 32, *, skip_broken: bool = False
    ) -> Iterator[Prediction | None]:
        """As `predict`, one result at a time; with ``skip_broken``, None for an image that cannot be read."""
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {top_k}")
        label = partial(self._label, top_k=min(top_k, len(self.classes)))
        return self._iterate(images, batch_size, skip_broken, self.preprocess.transform(), label)

    @torch.inference_mode()
    def _label(self, pixels: list[Tensor], top_k: int) -> list[Prediction]:
        top = self.runtime(torch.stack(pixels).to(self.device)).softmax(-1).cpu().topk(top_k)
        return [
            Prediction(tuple(self.classes[i] for i in indices), tuple(values))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


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
