"""The network of a classifier: a model from timm's registry, without changes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qtvit.models import build_model


def build(name: str, model_args: Mapping[str, Any], task_args: Mapping[str, Any]) -> nn.Module:
    """Build the classifier that a model file describes; ``task_args`` are empty."""
    return build_model(name, **model_args)
