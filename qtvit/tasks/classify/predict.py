"""Predicting the classes of images with a trained classifier."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo
from qtvit.data import ImageSource, Preprocess
from qtvit.deploy.predictor import Predictor
from qtvit.deploy.runtimes import Runtime


@dataclass(frozen=True)
class Prediction:
    """The names of the most probable classes of one image, in descending order, and their softmax outputs."""

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


class ClassPredictor(Predictor[Prediction]):
    """A trained classifier; ``preprocess`` is the preprocessing of its images."""

    task = "classify"

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(model, info, device, threads)
        self.preprocess = Preprocess(**info.preprocess)

    def iter_predict(
        self, images: Sequence[ImageSource], top_k: int = 5, batch_size: int = 32, *, skip_broken: bool = False
    ) -> Iterator[Any]:
        """Yield a `Prediction` with the ``top_k`` most probable classes for each image."""
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
