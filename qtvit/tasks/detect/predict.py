"""From images to the objects in them."""

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
in pixels) and, from a model with masks, ``segmentation`` (RLE).
"""
SCORE_THRESHOLD = 0.5
"""Default score from which objects are shown."""


@dataclass(frozen=True)
class Detections:
    """The n objects in an image, the most certain first.

    Attributes:
        labels: names of their classes.
        category_ids: ids of these classes in the data that the model was trained on.
        scores: from 0 to 1.
        boxes: (n, 4) left, top, right, bottom in pixels.
        masks: (n, H, W) bool; None from a model without masks.
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
        """The objects in COCO's submission format."""
        boxes = [[left, top, right - left, bottom - top] for left, top, right, bottom in self.boxes.tolist()]
        results: list[Result] = [
            {"image_id": image_id, "category_id": category_id, "score": score, "bbox": box}
            for category_id, score, box in zip(self.category_ids, self.scores, boxes, strict=True)
        ]
        if self.masks is not None:
            for result, rle in zip(results, encode_masks(self.masks), strict=True):
                result["segmentation"] = rle
        return results


class DetectPredictor(Predictor[Detections]):
    """A trained detector, see `Predictor`.

    Images run one at a time. In a batch they would be padded to one size, the attention would see the padding, and so
    the detections in an image would depend on its neighbours.

    Attributes:
        category_ids: ids of the classes in the data that the model was trained on.
    """

    task = "detect"

    def __init__(
        self, model: nn.Module | Runtime, info: ModelInfo, device: str = "auto", threads: int | None = None
    ) -> None:
        super().__init__(model, info, device, threads)
        self.category_ids = tuple(info.task_args["category_ids"])

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return bool(self.info.task_args["masks"])

    def iter_predict(
        self,
        images: Sequence[ImageSource],
        score_threshold: float = SCORE_THRESHOLD,
        classes: Sequence[str] | None = None,
        *,
        skip_broken: bool = False,
    ) -> Iterator[Any]:
        """The `Detections` in each image, one image at a time.

        Args:
            images: see `qtvit.data.open_image`.
            score_threshold: objects with a lower score are left out; the model itself leaves out those below 0.05.
            classes: names of the classes to look for; None for all.
            skip_broken: yield None for an image that cannot be read, instead of raising an error.

        Raises:
            ValueError: the threshold is not from 0 to 1, or the model does not know a class.
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
        known = [classes is None or name in classes for name in self.classes]
        found = []
        for output in map(self.runtime.detect, images):
            scored = zip(output["scores"].tolist(), output["labels"].tolist(), strict=True)
            kept = [i for i, (score, label) in enumerate(scored) if score >= score_threshold and known[label - 1]]
            chosen = {name: tensor[kept] for name, tensor in output.items()}
            found.append(read_output(chosen, self.classes, self.category_ids))
        return found


def read_output(output: Mapping[str, Tensor], classes: Sequence[str], category_ids: Sequence[int]) -> Detections:
    """The output of a `qtvit.tasks.detect.model.Detector` for an image, with names and ids in place of labels."""
    labels = [label - 1 for label in output["labels"].tolist()]
    return Detections(
        tuple(classes[label] for label in labels),
        tuple(category_ids[label] for label in labels),
        tuple(output["scores"].tolist()),
        output["boxes"].cpu(),
        output["masks"][:, 0].cpu() > 0.5 if "masks" in output else None,
    )


def coco_results(output: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    """The same output in COCO's submission format."""
    return read_output(output, list(map(str, category_ids)), category_ids).to_coco(image_id)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(n, H, W) bool masks as COCO's compressed RLE, with ``counts`` as text so that JSON can hold it."""
    from pycocotools import mask

    pixels = np.asfortranarray(masks.numpy().transpose(1, 2, 0), np.uint8)
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in mask.encode(pixels)]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) fp32 from 0 to 1."""
    return tvf.to_dtype(tvf.pil_to_tensor(image), torch.float32, scale=True)
