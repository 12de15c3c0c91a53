"""From pictures to labels."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo, load_model
from qtvit.data import ImageSource, Preprocess, class_names, open_image
from qtvit.device import resolve_device

from .artifact import format_of
from .runtimes import Network, Runtime, open_exported

DECODERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that read images ahead; PIL decodes and resizes without Python's lock."""


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


class Predictor:
    """A trained classifier with its classes and preprocessing, in whatever runs it.

    Args:
        model: the network, or an exported file.
        info: its description.
        device: see `qtvit.device.resolve_device`; of an exported file, its own.
        threads: of the CPU that the network may use; None leaves PyTorch's number.

    Attributes:
        runtime: what maps pixels to logits.
        classes: readable names (`qtvit.data.class_names`) in the order of the outputs.

    Raises:
        ValueError: the model has no classifier, or is not for RGB images.
    """

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
        self.preprocess = Preprocess(**info.preprocess)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", threads: int | None = None) -> "Predictor":
        """The model of a run folder, model file or weights file, or an exported one (.onnx, .xml, .pt2).

        Raises:
            FileNotFoundError, ValueError: as `qtvit.checkpoints.load_model` and `qtvit.deploy.runtimes.Exported`.
            ModuleNotFoundError: what runs the exported file is not installed.
        """
        if format_of(path):
            exported = open_exported(path, device, threads)
            return cls(exported, exported.artifact.info)
        return cls(*load_model(path), device, threads)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.runtime.device

    @property
    def model(self) -> nn.Module:
        """The PyTorch network; ValueError for an exported file, which has none."""
        if isinstance(self.runtime, Network):
            return self.runtime.module
        raise ValueError("an exported model has no layers to look into; give the run it was exported from")

    def close(self) -> None:
        """Free what the runtime holds; it cannot predict any more."""
        self.runtime.close()

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
        """As `predict`, one result at a time; with ``skip_broken``, None for an image that cannot be read.

        While a batch is in the network, threads read the next ones.
        """
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k and batch_size must be 1 or more, got {top_k} and {batch_size}")
        top_k = min(top_k, len(self.classes))
        ahead = _read_ahead(images, self.preprocess, 2 * batch_size, skip_broken)
        while batch := list(islice(ahead, batch_size)):
            readable = [pixels for pixels in batch if pixels is not None]
            found = iter(self._label(torch.stack(readable), top_k) if readable else [])
            yield from (None if pixels is None else next(found) for pixels in batch)

    @torch.inference_mode()
    def _label(self, pixels: Tensor, top_k: int) -> list[Prediction]:
        top = self.runtime(pixels.to(self.device)).softmax(-1).cpu().topk(top_k)
        return [
            Prediction(tuple(self.classes[i] for i in indices), tuple(values))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def _read_ahead(
    images: Sequence[ImageSource], preprocess: Preprocess, num_ahead: int, skip_broken: bool
) -> Iterator[Tensor | None]:
    """The network's input for each image, in order, while threads read up to ``num_ahead`` images further on."""
    transform = preprocess.transform()

    def read(image: ImageSource) -> Tensor | None:
        try:
            return transform(open_image(image))
        except (ValueError, OSError):
            if not skip_broken:
                raise
            return None

    pool = ThreadPoolExecutor(min(DECODERS, len(images)) or 1, thread_name_prefix="qtvit-read")
    waiting: deque[Future[Tensor | None]] = deque()
    try:
        for image in images:
            waiting.append(pool.submit(read, image))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
