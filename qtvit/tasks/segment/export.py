"""Export of a segmenter, and what its file is checked on."""

import dataclasses
from typing import Any

from torch import nn

from qtvit.checkpoints import ModelInfo
from qtvit.data import ImageSource, Preprocess
from qtvit.deploy.artifact import Artifact
from qtvit.deploy.export import NUM_DENSE, Exporter, Request, chosen
from qtvit.deploy.parity import synthetic_images
from qtvit.deploy.runtimes import Exported

from .data import load_segmentation_data
from .evaluate import evaluate
from .predict import SegmentPredictor, Views, mask_classes

NUM_MASKS = 100
"""Number of images with masks on which the mIoU is compared."""


class SegmentExporter(Exporter):
    """The export of a segmenter without its auxiliary head, which only training needs."""

    dense = True

    def __init__(self, network: nn.Module, info: ModelInfo, request: Request) -> None:
        segmenter: Any = network
        segmenter.aux = None
        super().__init__(network, dataclasses.replace(info, task_args={**info.task_args, "aux": False}), request)

    @property
    def preprocess(self) -> Preprocess:
        """Images are resized to the size of the training crops."""
        given = self.info.preprocess
        return Preprocess(tuple(given["size"]), 1.0, "bilinear", tuple(given["mean"]), tuple(given["std"]))

    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], list[int] | None, str]:
        data, calibration = self.request.data, self.request.calibration
        if data is not None:
            val = load_segmentation_data(data, ignore_index=mask_classes(artifact.info).ignore_index).val
            images: list[ImageSource] = [val[i].image for i in chosen(len(val), NUM_DENSE)]
            return images, None, f"{len(images)} images of val in {data}"
        images = (calibration or synthetic_images(NUM_DENSE, artifact.img_size))[:NUM_DENSE]
        return images, None, f"{len(images)} {'calibration' if calibration else 'synthetic'} images"

    def score(self, predictor: Any, exported: Exported) -> tuple[str, tuple[float, float]]:
        """mIoU of the network and of the file, for both in windows if the file needs them."""
        loaded = load_segmentation_data(str(self.request.data), ignore_index=predictor.mask_classes.ignore_index)
        samples = [loaded.val[i] for i in chosen(len(loaded.val), NUM_MASKS)]
        views = Views(window=None if "hw" in self.request.axes else True)
        network, file = (
            evaluate(each, samples, loaded.mask_classes, views).scores.mean_iou()
            for each in (predictor, SegmentPredictor(exported, self.info))
        )
        return "mIoU", (network, file)
