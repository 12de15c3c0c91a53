"""qtvit: vision backbones with quadratic-Taylor linear attention. Importing it registers the models with timm."""

from . import models

__all__ = ["models"]
__version__ = "0.1.0"
