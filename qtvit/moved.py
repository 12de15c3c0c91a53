"""Old names of what is in `qtvit.tasks`, `qtvit.doctor` and `qtvit.ablation`: documentation has given them."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES: dict[str, dict[str, str]] = {
    "qtvit.data": {
        "qtvit.tasks.classify.check": "check_data",
        "qtvit.tasks.classify.data": "ImageDataset LabelledImages load_labelled_images read_split",
        "qtvit.tasks.classify.pack": "pack_folder",
        "qtvit.tasks.classify.transforms": "TrainTransform",
        "qtvit.tasks.classify.unreadable": "drop_broken find_broken",
        "qtvit.tasks.detect.check": "check_detection_data",
        "qtvit.tasks.detect.data": "DetectionData DetectionDataset load_detection_data load_held_out",
        "qtvit.tasks.detect.transforms": "DetectionTransform",
        "qtvit.tasks.scenes": "write_scenes",
        "qtvit.tasks.segment.check": "check_segmentation_data",
        "qtvit.tasks.segment.data": "SegmentationData SegmentationDataset load_segmentation_data",
        "qtvit.tasks.segment.layout": "SegmentationSample",
        "qtvit.tasks.segment.masks": "MaskClasses",
        "qtvit.tasks.segment.transforms": "SegmentationEvalTransform SegmentationTrainTransform",
    },
    "qtvit.deploy": {
        "qtvit.tasks.classify.predict": "ClassPredictor Prediction",
        "qtvit.tasks.detect.predict": "DetectPredictor Detections",
        "qtvit.tasks.segment.predict": "Segmentation SegmentPredictor Views",
    },
    "qtvit.models": {"qtvit.tasks.detect.model": "Detector build_detector"},
}
"""By package that names were imported from: the modules they are in, each with its names."""

MODULES = {
    "qtvit.data.detection": "qtvit.tasks.detect.data",
    "qtvit.data.stream": "qtvit.tasks.classify.stream",
    "qtvit.deploy.doctor": "qtvit.doctor",
    "qtvit.training.table3": "qtvit.ablation.table3",
}
"""The modules that were moved as a whole: old name to new name."""


def find(package: str, name: str) -> Any:
    """Import ``name``, which was in ``package``; AttributeError if it was not. For the package's ``__getattr__``."""
    for module, names in NAMES[package].items():
        if name in names.split():
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules in `MODULES` under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return importlib.import_module(MODULES[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: importing the module under its own name has executed it."""


def install() -> None:
    """Make the old names in `MODULES` importable."""
    sys.meta_path.append(_Finder())
