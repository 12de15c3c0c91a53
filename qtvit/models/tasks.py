"""Builds the network of each task from the description in a model file."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qtvit.errors import unknown_name

from .build import build_model
from .detection import build_detector
from .segmentation import build_segmenter


def build_task_model(
    task: str, name: str, model_args: Mapping[str, Any], task_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the network of a task: `build_model`'s classifier, or one with the heads that ``task_args`` describe.

    For "detect", ``task_args`` holds ``category_ids`` and the options of `build_detector`; for "segment", ``masks``,
    which says what the values in masks mean, and the options of `build_segmenter`.

    Raises:
        ValueError: there is no such task, or the task's builder rejects the arguments.
    """
    if task == "classify":
        return build_model(name, **model_args)
    if task == "detect":
        heads = dict(task_args or {})
        return build_detector(name, num_classes=len(heads.pop("category_ids")), model_args=model_args, **heads)
    if task == "segment":
        heads = dict(task_args or {})
        num_classes = len(heads.pop("masks")["values"])
        return build_segmenter(name, num_classes=num_classes, model_args=model_args, **heads)
    raise unknown_name("task", task, ("classify", "detect", "segment"))
