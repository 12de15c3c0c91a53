"""Export of a detector to ONNX: one file from an image of any size to boxes, labels, scores and masks in its pixels.

The file is made of two graphs. The network and its pyramid are exported with ``torch.export``, as all our networks are.
What torchvision's heads do depends on how many boxes are left, which ``torch.export`` cannot follow; they are exported
with the tracing exporter, for which torchvision has forms of its own.

Shapes: H x W image, n objects.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from qtvit.console import progress
from qtvit.data import ImageSource, open_image
from qtvit.deploy.artifact import DETECTIONS, METADATA_KEY, Artifact
from qtvit.deploy.export import NUM_DENSE, Export, Exporter, chosen
from qtvit.deploy.formats import OPSET, onnx_program, quiet_tools, trace
from qtvit.deploy.parity import synthetic_images
from qtvit.deploy.runtimes import Runtime, open_exported

from .data import load_held_out
from .model import Detector
from .predict import DetectPredictor, to_pixels

COUNTED = 0.3
"""Score from which an object that the detector or the file finds must also be found by the other."""
SAME_IOU, SAME_SCORE = 0.95, 0.01
"""Least overlap and largest difference of scores of two objects of the same class that count as the same."""
MIN_MATCHED = 0.99
"""Part of all objects that must be found by both."""
SIZES = "sizes"
"""Name of a tensor that goes from the first graph to the second: H, W, and those of the resized image."""


class Maps(nn.Module):
    """(3, H, W) in 0..1 -> ``sizes`` (4,), H and W and those of the resized image, and the pyramid's feature maps."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.transform = detector.transform
        self.backbone = detector.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        resize: Any = self.transform
        x = resize.scaled(resize.normalize(images), resize.min_size[-1])
        height, width = x.shape[-2:]
        sizes = [torch.full((), side, dtype=torch.int64) for side in (*images.shape[-2:], height, width)]
        x = F.pad(x, (0, -width % resize.size_divisible, 0, -height % resize.size_divisible))
        return torch.stack(sizes), *self.backbone(x[None]).values()


class Heads(nn.Module):
    """``sizes`` and feature maps -> boxes (n, 4), labels (n,), scores (n,) and, with mask heads, masks (n, 1, H, W)."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.transform = detector.transform
        self.rpn = detector.rpn
        self.roi_heads = detector.roi_heads

    def forward(self, sizes: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        height, width, *resized = sizes.unbind()
        features = {**{str(i): x for i, x in enumerate(maps[:-1])}, "pool": maps[-1]}
        shapes: Any = [tuple(resized)]
        proposals, _ = self.rpn(ImageList(maps[0], shapes), features)
        found, _ = self.roi_heads(features, proposals, shapes)
        [result] = self.transform.postprocess(found, shapes, [(height, width)])
        return tuple(result[name] for name in DETECTIONS if name in result)


def write_detector(detector: Detector, artifact: Artifact, path: Path) -> None:
    """Write ``detector``, ready for inference and in fp32, as one .onnx file.

    Raises:
        ValueError: the network cannot be exported.
    """
    import onnx.compose

    parts = Maps(detector).eval(), Heads(detector).eval()
    side = detector.transform.min_size[-1]
    example = torch.zeros(3, side + 1, side + 9)
    with torch.no_grad():
        maps = parts[0](example)
    names = [SIZES, *(f"map{i}" for i in range(len(maps) - 1))]
    program = onnx_program(trace(parts[0], example, {1, 2}, artifact), names, artifact)
    first, second = program.model_proto, _trace_heads(parts[1], maps, names, artifact)
    second.ir_version = first.ir_version
    second = onnx.compose.add_prefix(second, "heads/", rename_inputs=False, rename_outputs=False)
    model = onnx.compose.merge_models(first, second, io_map=[(name, name) for name in names])
    del model.graph.value_info[:]  # shapes of the example
    onnx.helper.set_model_props(model, {METADATA_KEY: artifact.to_json()})
    onnx.save(model, path)


def _trace_heads(heads: Heads, maps: tuple[Tensor, ...], names: Sequence[str], artifact: Artifact) -> Any:
    """The ``onnx.ModelProto`` of the heads."""
    import onnx

    outputs = [name for name in DETECTIONS if name != "masks" or artifact.info.task_args["masks"]]
    axes: dict[str, dict[int, str]] = {name: {2: f"height_{name}", 3: f"width_{name}"} for name in names[1:]}
    axes |= {name: {0: "num_objects"} for name in outputs}
    if "masks" in outputs:
        axes["masks"] |= {2: "height", 3: "width"}
    settings: dict[str, Any] = {"opset_version": OPSET, "input_names": names, "output_names": outputs}
    with quiet_tools(), torch.no_grad(), tempfile.TemporaryDirectory(prefix="qtvit-") as folder:
        file = Path(folder, "heads.onnx")
        torch.onnx.export(heads, maps, file, dynamo=False, dynamic_axes=axes, **settings)
        return onnx.load(file)


@dataclass(frozen=True)
class DetectorReport:
    """Comparison of the file with the detector on some images."""

    img_sizes: tuple[tuple[int, int], tuple[int, int]]  # smallest and largest (H, W), by area
    num_images: int
    num_objects: int  # that the detector finds with a score of `COUNTED` or more
    num_missing: int  # of these, that the file does not find
    num_surplus: int  # that only the file finds with such a score

    def problem(self) -> str | None:
        """What is wrong with the file; None if nothing is."""
        # One object is no fault of the file: rounding decides between two overlapping proposals of nearly equal score.
        if max(self.num_missing, self.num_surplus) > max(1, (1 - MIN_MATCHED) * self.num_objects):
            return (
                f"of {self.num_objects} objects, {self.num_missing} are not found by it, and {self.num_surplus} others "
                f"are; {MIN_MATCHED:.0%} have to be the same"
            )
        return None

    def lines(self) -> list[str]:
        """The report in words."""
        smallest, largest = ("x".join(map(str, size)) for size in self.img_sizes)
        images = f"{self.num_images} images of {smallest} to {largest} px"
        if not self.num_objects + self.num_surplus:
            return [f"{images}: nothing found in any, by neither; --data or --calibration gives typical ones"]
        return [
            f"{images}, {self.num_objects} objects with a score of {COUNTED} or more: {self.num_missing} not found by "
            f"the file, {self.num_surplus} found by it alone"
        ]


def check_detector(detector: Runtime, exported: Runtime, images: Sequence[ImageSource]) -> DetectorReport:
    """Run both on ``images`` at their own sizes, each once upright and once turned on its side."""
    sizes: list[tuple[int, int]] = []
    counts = np.zeros(3, np.int64)  # objects, missing, surplus
    for image in progress(images, desc="Checking", unit="image"):
        upright = to_pixels(open_image(image))
        for pixels in (upright, upright.mT.contiguous()):
            expected, found = detector.detect(pixels), exported.detect(pixels)
            sizes.append((pixels.shape[-2], pixels.shape[-1]))
            num_objects = int((expected["scores"] >= COUNTED).sum())
            counts += num_objects, _num_without_partner(expected, found), _num_without_partner(found, expected)
    sizes.sort(key=lambda size: size[0] * size[1])
    return DetectorReport((sizes[0], sizes[-1]), len(sizes), *counts.tolist())


def _num_without_partner(objects: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    """How many of the ``objects`` with a score of `COUNTED` or more are not the same as one of ``others``."""
    same = box_iou(objects["boxes"].cpu(), others["boxes"].cpu()) >= SAME_IOU
    same &= objects["labels"].cpu()[:, None] == others["labels"].cpu()
    same &= (objects["scores"].cpu()[:, None] - others["scores"].cpu()).abs() <= SAME_SCORE
    return int(((objects["scores"].cpu() >= COUNTED) & ~same.any(1)).sum())


class DetectExporter(Exporter):
    """The export of a detector to one ONNX file that takes images of any size."""

    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], None, str]:
        info, data, calibration = artifact.info, self.request.data, self.request.calibration
        if data is not None:
            names = dict(zip(info.task_args["category_ids"], info.classes, strict=True))
            val = load_held_out(data, names, use_masks=False)
            images: list[ImageSource] = [val[i].image for i in chosen(len(val), NUM_DENSE)]
            which = f"images of val in {data}"
        elif calibration is not None:
            images, which = calibration[:NUM_DENSE], "calibration images"
        else:
            side = max(info.task_args["min_size"])
            images, which = synthetic_images(NUM_DENSE, (side, side * 4 // 3)), "synthetic images"
        return images, None, f"{len(images)} {which}, upright and on their side"

    def export(self) -> Export:
        request = self.request
        if (request.format, request.precision) != ("onnx", "fp32"):
            given = f"{request.format} and {request.precision}"
            raise ValueError(f"a detector is exported with --format onnx --precision fp32, not {given}")
        if request.img_size is not None:
            raise ValueError(
                "--img-size: the file of a detector takes images of any size and resizes them itself, as in training"
            )
        if request.axes_given and request.axes != ("hw",):
            raise ValueError(
                f"--dynamic {','.join(request.axes) or 'none'}: the file of a detector takes one image of any size, "
                "which is hw"
            )
        artifact = Artifact(self.info, "onnx", "fp32", ("hw",))
        images, _, which = self.check_images(artifact)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=request.out.parent) as folder:
            file = Path(folder, request.out.name)
            detector: Any = self.network
            write_detector(detector, artifact, file)
            exported = open_exported(file, "cpu")
            report = check_detector(DetectPredictor(detector, self.info, "cpu").runtime, exported, images)
            exported.close()
            if problem := report.problem():
                raise ValueError(f"not exported: the file for ONNX Runtime failed its check: {problem}")
            os.replace(file, request.out)
        return Export([request.out], artifact, report, which)
