"""qtvit: vision backbones with quadratic-Taylor linear attention.

Importing it registers the models with timm: ``import qtvit, timm; timm.create_model("qtvit_1")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import models
from .version import __version__

if TYPE_CHECKING:
    from .deploy import Predictor

__all__ = ["__version__", "load", "models"]


def load(path: str | Path, device: str = "auto") -> Predictor:
    """The trained model of a run folder or model file, ready to ``predict``; see `qtvit.deploy.Predictor.load`."""
    from .deploy import Predictor

    return Predictor.load(path, device)
