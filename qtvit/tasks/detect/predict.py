"""From pictures to the objects in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from qtvit.checkpoints import ModelInfo
from qtvit.data import ImageSource
from qtvit.deploy.predictor import Predictor
from qtvit.deploy.runtimes import Runtime
from qtvit.errors import unknown_name

Result = dict[str, Any]
"""An object in COCO's submission format: ``image_id``, ``category_id``, ``score``, ``bbox`` (left, top, width, height
in pixels) and, of a model with masks, ``segmentation`` (RLE).
"""
SCORE_THRESHOLD = 0.5
"""From which on objects are shown."""


@dataclass(frozen=True)
class Detections:
    """The objects in an image, n of them, the most certain first.

    Attributes:
        labels: names of their classes.
        category_ids: ids of these in the data that the model was trained on.
        scores: from 0 to 1.
        boxes: (n, 4) left, top, right, bottom in pixels.
        masks: (n, H, W) bool; None of a model without masks.
    """

    labels: tuple[str, ...]
    category_ids: tuple[int, ...]
    scores: tuple[float, ...]
    boxes: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return ", ".join(f"{label} {score:.0%}" for label, score in zip(self.labels, self.scores, strict=True))

    def to_coco(self, image_id: int | str) -> list[Result]:
        """In COCO's submission format."""
        results: list[Result] = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "score": score,
                "bbox": [left, top, right - left, bottom - top],
            }
            for category_id, score, (left, top, right, bottom) in zip(
                self.category_ids, self.scores, self.boxes.tolist(), strict=True
            )
        ]
        if self.masks is not None:
            for result, rle in zip(results, encode_masks(self.masks), strict=True):
                result["segmentation"] = rle
        return results


class DetectPredictor(Predictor[Detections]):
    """A trained detector, see `Predictor`.

    Images are looked at one at a time: the attention sees all of a batch's padding, so what is found in an image would
    depend on its neighbours.

    Attributes:
        category_ids: of the classes, in the data that the model was trained on.
    """

    task = "detect"

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(model, info, device, threads)
        self.category_ids = tuple(info.task_args["category_ids"])

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks too."""
        return bool(self.info.task_args["masks"])

    def iter_predict(
        self,
        images: Sequence[ImageSource],
        score_threshold: float = SCORE_THRESHOLD,
        classes: Sequence[str] | None = None,
        *,
        skip_broken: bool = False,
    ) -> Iterator[Any]:
        """The objects in each image, `Detections` at a time.

        Args:
            images: see `qtvit.data.open_image`.
            score_threshold: what is less certain is left out; the model itself leaves out what is below 0.05.
            classes: names of those to look for; None for all.
            skip_broken: give None for an image that cannot be read.

        Raises:
            ValueError: a threshold that is not from 0 to 1, or a class that the model does not know.
        """
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be from 0 to 1, got {score_threshold}")
        for name in classes or ():
            if name not in self.classes:
                raise unknown_name("class", name, self.classes)
        find = partial(self._find, score_threshold=score_threshold, classes=classes)
        return self._iterate(images, 1, skip_broken, to_pixels, find)

    @torch.inference_mode()
    def _find(self, images: list[Tensor], score_threshold: float, classes: Sequence[str] | None) -> list[Detections]:
        return [self._chosen(self.runtime.detect(image), score_threshold, classes) for image in images]

    def _chosen(
        self, output: Mapping[str, Tensor], score_threshold: float, classes: Sequence[str] | None
    ) -> Detections:
        indices = [
            i
            for i, (score, label) in enumerate(zip(output["scores"].tolist(), output["labels"].tolist(), strict=True))
            if score >= score_threshold and (classes is None or self.classes[label - 1] in classes)
        ]
        found = {name: tensor[indices] for name, tensor in output.items()}
        labels = [label - 1 for label in found["labels"].tolist()]
        return Detections(
            tuple(self.classes[label] for label in labels),
            tuple(self.category_ids[label] for label in labels),
            tuple(found["scores"].tolist()),
            found["boxes"].cpu(),
            found["masks"][:, 0].cpu() > 0.5 if "masks" in found else None,
        )


def coco_results(output: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    """What a detector says of an image (see `qtvit.tasks.detect.model.Detector`), in COCO's submission format."""
    labels = output["labels"].tolist()
    masks = output["masks"][:, 0].cpu() > 0.5 if "masks" in output else None
    ids = tuple(category_ids[label - 1] for label in labels)
    return Detections(
        tuple(map(str, ids)), ids, tuple(output["scores"].tolist()), output["boxes"].cpu(), masks
    ).to_coco(image_id)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(n, H, W) bool to COCO's compressed RLE, with text as ``counts``, so that it goes into JSON."""
    from pycocotools import mask

    pixels = np.asfortranarray(masks.numpy().transpose(1, 2, 0), np.uint8)
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in mask.encode(pixels)]


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) fp32 from 0 to 1."""
    return tvf.to_dtype(tvf.pil_to_tensor(image), torch.float32, scale=True)
