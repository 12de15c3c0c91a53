"""qtvit: vision backbones with quadratic-Taylor linear attention.

Importing it registers the models with timm: ``import qtvit, timm; timm.create_model("qtvit_1")``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models, moved
from .version import __version__

if TYPE_CHECKING:
    from . import explain
    from .deploy import Predictor
    from .tasks.classify.train import RunSummary
    from .tasks.detect.train import DetectSummary
    from .tasks.segment.train import SegmentSummary

moved.install()

__all__ = ["__version__", "explain", "load", "models", "train_classifier", "train_detector", "train_segmenter"]


def __getattr__(name: str) -> Any:
    """Import ``qtvit.explain`` when it is first used."""
    if name == "explain":
        return importlib.import_module(".explain", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | Path, device: str = "auto", threads: int | None = None) -> Predictor:
    """Load a trained model from a run folder, model file or exported file; see `qtvit.deploy.Predictor.load`."""
    from .deploy import Predictor

    return Predictor.load(path, device, threads)


def train_classifier(**options: Any) -> RunSummary | None:
    """Run ``qtvit train classify`` with its options as keyword arguments, and those of a group as a dictionary.

    ``train_classifier(data="photos", model="qtvit_1", epochs=50, optim={"layer_decay": 0.8})``. All options are
    ``recipe`` and the fields of `qtvit.tasks.classify.config.ClassifyConfig`. Under ``torchrun``, all processes but
    the first return None.

    Raises:
        ValueError, FileNotFoundError: the command's errors.
        KeyboardInterrupt: the user pressed Ctrl-C; the message says how to resume.
    """
    return _train("classify", options)


def train_detector(**options: Any) -> DetectSummary | None:
    """Run ``qtvit train detect`` with the fields of `qtvit.tasks.detect.config.DetectConfig`, as `train_classifier`.

    ``train_detector(data="photos", checkpoint="runs/qtvit_1-imagenet", min_size=[480, 640])``
    """
    return _train("detect", options)


def train_segmenter(**options: Any) -> SegmentSummary | None:
    """Run ``qtvit train segment`` with the fields of `qtvit.tasks.segment.config.SegmentConfig`, as `train_classifier`.

    ``train_segmenter(data="streets", model="qtvit_1", head="light", crop_size="512x1024", loss={"dice": 1.0})``
    """
    return _train("segment", options)


def _train(task: str, options: dict[str, Any]) -> Any:
    from . import tasks
    from .training.job import train
    from .training.options import make_config

    return train(make_config(tasks.get(task).load("config"), **options))
