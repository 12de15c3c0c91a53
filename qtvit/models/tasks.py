"""The network of each task, from what a model file says of it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qtvit.errors import unknown_name

from .build import build_model
from .detection import build_detector


def build_task_model(
    task: str, name: str, model_args: Mapping[str, Any], task_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network of a task: `build_model`'s, or one with the heads that ``task_args`` describe.

    For "detect", those are ``category_ids`` and the options of `build_detector`.

    Raises:
        ValueError: there is no such task, or as `build_model`.
    """
    if task == "classify":
        return build_model(name, **model_args)
    if task == "detect":
        heads = dict(task_args or {})
        return build_detector(name, num_classes=len(heads.pop("category_ids")), model_args=model_args, **heads)
    raise unknown_name("task", task, ("classify", "detect"))
