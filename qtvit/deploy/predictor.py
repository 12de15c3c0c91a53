"""From pictures to labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import nn

from qtvit.checkpoints import ModelInfo, load_model
from qtvit.data import ImageSource, Preprocess, class_names, open_image
from qtvit.device import resolve_device


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
    """A trained classifier with its classes and preprocessing.

    Args:
        model: the network.
        info: its description.
        device: see `qtvit.device.resolve_device`.

    Attributes:
        classes: readable names (`qtvit.data.class_names`) in the order of the outputs.

    Raises:
        ValueError: the model has no classifier, or is not for RGB images.
    """

    def __init__(self, model: nn.Module, info: ModelInfo, device: str = "auto") -> None:
        if not info.classes:
            raise ValueError(f"this {info.model} has no classifier; `qtvit train classify --checkpoint` can add one")
        if (in_chans := info.model_args.get("in_chans", 3)) != 3:
            raise ValueError(f"this {info.model} is for images of {in_chans} channels, and images are read as RGB")
        self.device = resolve_device(device)
        self.model = model.eval().to(self.device)
        self.info = info
        self.classes = class_names(info.classes)
        self.preprocess = Preprocess(**info.preprocess)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> "Predictor":
        """The model of a run folder, model file or weights file; errors as `qtvit.checkpoints.load_model`."""
        return cls(*load_model(path), device)

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

    @torch.inference_mode()
    def iter_predict(self, images: Sequence[ImageSource], top_k: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
        """As `predict`, one result at a time."""
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k and batch_size must be 1 or more, got {top_k} and {batch_size}")
        transform = self.preprocess.transform()
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = torch.stack([transform(open_image(image)) for image in batch]).to(self.device)
            probabilities = self.model(pixels).float().softmax(-1).cpu()
            top = probabilities.topk(min(top_k, len(self.classes)))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                yield Prediction(tuple(self.classes[i] for i in indices), tuple(values))
