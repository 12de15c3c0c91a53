"""Names that the documentation has given for what is in `qtvit.tasks`, `qtvit.doctor` and `qtvit.ablation`."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES: dict[str, dict[str, str]] = {
    "qtvit.data": {
        "check_data": "qtvit.tasks.classify.check",
        "check_detection_data": "qtvit.tasks.detect.check",
        "check_segmentation_data": "qtvit.tasks.segment.check",
        "DetectionData": "qtvit.tasks.detect.data",
        "DetectionDataset": "qtvit.tasks.detect.data",
        "DetectionTransform": "qtvit.tasks.detect.transforms",
        "drop_broken": "qtvit.tasks.classify.unreadable",
        "find_broken": "qtvit.tasks.classify.unreadable",
        "ImageDataset": "qtvit.tasks.classify.data",
        "LabelledImages": "qtvit.tasks.classify.data",
        "load_detection_data": "qtvit.tasks.detect.data",
        "load_held_out": "qtvit.tasks.detect.data",
        "load_labelled_images": "qtvit.tasks.classify.data",
        "load_segmentation_data": "qtvit.tasks.segment.data",
        "MaskClasses": "qtvit.tasks.segment.masks",
        "pack_folder": "qtvit.tasks.classify.pack",
        "read_split": "qtvit.tasks.classify.data",
        "SegmentationData": "qtvit.tasks.segment.data",
        "SegmentationDataset": "qtvit.tasks.segment.data",
        "SegmentationEvalTransform": "qtvit.tasks.segment.transforms",
        "SegmentationSample": "qtvit.tasks.segment.layout",
        "SegmentationTrainTransform": "qtvit.tasks.segment.transforms",
        "TrainTransform": "qtvit.tasks.classify.transforms",
        "write_scenes": "qtvit.tasks.scenes",
    },
    "qtvit.deploy": {
        "ClassPredictor": "qtvit.tasks.classify.predict",
        "DetectPredictor": "qtvit.tasks.detect.predict",
        "Detections": "qtvit.tasks.detect.predict",
        "Prediction": "qtvit.tasks.classify.predict",
        "Segmentation": "qtvit.tasks.segment.predict",
        "SegmentPredictor": "qtvit.tasks.segment.predict",
        "Views": "qtvit.tasks.segment.predict",
    },
    "qtvit.models": {
        "Detector": "qtvit.tasks.detect.model",
        "build_detector": "qtvit.tasks.detect.model",
    },
}
"""By package, where each name is."""

MODULES = {
    "qtvit.data.detection": "qtvit.tasks.detect.data",
    "qtvit.data.stream": "qtvit.tasks.classify.stream",
    "qtvit.deploy.doctor": "qtvit.doctor",
    "qtvit.training.table3": "qtvit.ablation.table3",
}


def find(package: str, name: str) -> Any:
    """For ``__getattr__`` of a package; AttributeError if it has no such name here."""
    if name not in NAMES[package]:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(NAMES[package][name]), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules in `MODULES` as what they are called now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return importlib.import_module(MODULES[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """It is executed already."""


def install() -> None:
    """Let the modules in `MODULES` be imported."""
    sys.meta_path.append(_Finder())
