"""The tasks that a network can be trained for, by name; what one needs is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from .job import Summary


def config_class(task: str) -> type[TrainConfig]:
    """The configuration of a task."""
    from .classify_config import ClassifyConfig
    from .detect_config import DetectConfig

    return {"classify": ClassifyConfig, "detect": DetectConfig}[task]


def run_task(config: TrainConfig) -> Summary | None:
    """Train as ``config`` says; see `qtvit.training.job.run_job`."""
    module: Any = importlib.import_module(f".{config.task}", __package__)
    summary: Summary | None = module.run_training(config)
    return summary
