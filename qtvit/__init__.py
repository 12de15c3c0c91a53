"""qtvit: vision backbones with quadratic-Taylor linear attention.

Importing it registers the models with timm: ``import qtvit, timm; timm.create_model("qtvit_1")``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models
from .version import __version__

if TYPE_CHECKING:
    from . import explain
    from .deploy import Predictor
    from .training.classify import RunSummary
    from .training.detect import DetectSummary
    from .training.segment import SegmentSummary

__all__ = ["__version__", "explain", "load", "models", "train_classifier", "train_detector", "train_segmenter"]


def __getattr__(name: str) -> Any:
    """``qtvit.explain``, imported when it is first used."""
    if name == "explain":
        return importlib.import_module(".explain", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | Path, device: str = "auto", threads: int | None = None) -> Predictor:
    """The trained model of a run folder, model file or exported file, ready to ``predict``.

    See `qtvit.deploy.Predictor.load`.
    """
    from .deploy import Predictor

    return Predictor.load(path, device, threads)


def train_classifier(**options: Any) -> RunSummary | None:
    """``qtvit train classify`` with its options as keyword arguments, those of a group as a dictionary.

    ``train_classifier(data="photos", model="qtvit_1", epochs=50, optim={"layer_decay": 0.8})``; see
    `qtvit.training.classify_config.ClassifyConfig` for all of them, besides ``recipe``. Under ``torchrun``, None for
    all processes but the first.

    Raises:
        ValueError, FileNotFoundError: as the command's errors.
        KeyboardInterrupt: the user pressed Ctrl-C; the message says how to go on.
    """
    from .training.classify import run_training
    from .training.classify_config import ClassifyConfig
    from .training.options import make_config

    return run_training(make_config(ClassifyConfig, **options))


def train_detector(**options: Any) -> DetectSummary | None:
    """``qtvit train detect`` with its options as keyword arguments, as `train_classifier` has them.

    ``train_detector(data="photos", checkpoint="runs/qtvit_1-imagenet", min_size=[480, 640])``; see
    `qtvit.training.detect_config.DetectConfig` for all of them.
    """
    from .training.detect import run_training
    from .training.detect_config import DetectConfig
    from .training.options import make_config

    return run_training(make_config(DetectConfig, **options))


def train_segmenter(**options: Any) -> SegmentSummary | None:
    """``qtvit train segment`` with its options as keyword arguments, as `train_classifier` has them.

    ``train_segmenter(data="streets", model="qtvit_1", head="light", crop_size="512x1024", loss={"dice": 1.0})``; see
    `qtvit.training.segment_config.SegmentConfig` for all of them.
    """
    from .training.options import make_config
    from .training.segment import run_training
    from .training.segment_config import SegmentConfig

    return run_training(make_config(SegmentConfig, **options))
