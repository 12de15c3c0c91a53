"""The registry of tasks: for each task its package and the parts in it. All dispatch by task goes through here.

Importing this module imports no task; a part is imported when it is asked for.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from qtvit.errors import unknown_name

Part = Literal["build", "config", "job", "predictor", "exporter", "check", "commands"]


@dataclass(frozen=True)
class Task:
    """A row of the registry; each `Part` is given as "module.name" within the package.

    Attributes:
        name: as in ``qtvit train NAME`` and in model files.
        what: short description for ``qtvit train --help``.
        package: dotted name of the package that has the parts.
        build: function (model, model_args, task_args) -> the network that a model file describes.
        config: a `qtvit.training.config.TrainConfig` with the options of ``qtvit train NAME``.
        job: a `qtvit.training.job.Job` with what is specific to the training of this task.
        predictor: a `qtvit.deploy.predictor.Predictor`.
        exporter: a `qtvit.deploy.export.Exporter`.
        check: function (folder, **options) -> report for ``qtvit data check``, see `qtvit.data.ProblemReport`.
        commands: a `qtvit.tasks.commands.TaskCommands` with what is specific to the task at the command line.
    """

    name: str
    what: str
    package: str
    build: str
    config: str
    job: str
    predictor: str
    exporter: str
    check: str
    commands: str

    def load(self, part: Part) -> Any:
        """Import and return a part; ModuleNotFoundError if a package that it needs is not installed."""
        module, _, name = getattr(self, part).rpartition(".")
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)


TASKS: dict[str, Task] = {}
"""All tasks by name; `register` adds a task from outside this package."""


def register(task: Task) -> None:
    """Add a task; replaces one of the same name."""
    TASKS[task.name] = task


def get(name: str) -> Task:
    """Return the task of this name; ValueError with the known names if there is none."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


register(
    Task(
        name="classify",
        what="image classification",
        package="qtvit.tasks.classify",
        build="model.build",
        config="config.ClassifyConfig",
        job="train.ClassifyJob",
        predictor="predict.ClassPredictor",
        exporter="export.ClassifyExporter",
        check="check.check_data",
        commands="commands.ClassifyCommands",
    )
)
register(
    Task(
        name="detect",
        what="object detection, with masks if the data have such",
        package="qtvit.tasks.detect",
        build="model.build",
        config="config.DetectConfig",
        job="train.DetectJob",
        predictor="predict.DetectPredictor",
        exporter="export.DetectExporter",
        check="check.check_detection_data",
        commands="commands.DetectCommands",
    )
)
register(
    Task(
        name="segment",
        what="semantic segmentation",
        package="qtvit.tasks.segment",
        build="model.build",
        config="config.SegmentConfig",
        job="train.SegmentJob",
        predictor="predict.SegmentPredictor",
        exporter="export.SegmentExporter",
        check="check.check_segmentation_data",
        commands="commands.SegmentCommands",
    )
)
