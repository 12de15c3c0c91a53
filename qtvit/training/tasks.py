"""The tasks that a network can be trained for, by name; what one needs is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import TrainConfig

if TYPE_CHECKING:
    from .job import Summary


def config_class(task: str) -> type[TrainConfig]:
    """The configuration of a task."""
    from .classify_config import ClassifyConfig
    from .segment_config import SegmentConfig

    return {"classify": ClassifyConfig, "segment": SegmentConfig}[task]


def run_task(config: TrainConfig) -> Summary | None:
    """Train as ``config`` says; see `qtvit.training.job.run_job`."""
    from .classify_config import ClassifyConfig
    from .segment_config import SegmentConfig

    if isinstance(config, SegmentConfig):
        from .segment import run_training as run_segmentation

        return run_segmentation(config)
    assert isinstance(config, ClassifyConfig)
    from .classify import run_training

    return run_training(config)
