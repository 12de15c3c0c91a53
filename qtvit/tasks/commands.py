"""What the command line asks and says differently for each task: the base of every task's commands."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Option:
    """An option of a command that only some tasks have.

    Attributes:
        flag: as in "--top-k".
        help: what it is for.
        default: its value where it is not given.
        settings: further arguments of ``ArgumentParser.add_argument``; ``type`` may also be "positive", for a number of
            1 or more, or "new_file", for the path of a file to write.
    """

    flag: str
    help: str
    default: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its attribute in the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Quickstart:
    """A training on data that come with the package.

    Attributes:
        recipe: name of the recipe.
        next: what to do after it, with places for the command, the run and the data.
        scenes: folder that sample scenes are written to first; None if there is nothing to write.
        num_train, num_val: numbers of scenes.
    """

    recipe: str
    next: str
    scenes: str | None = None
    num_train: int = 0
    num_val: int = 0


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found, in all forms in which ``qtvit eval`` gives it.

    Attributes:
        headline: the scores in a line.
        lines: tables to print.
        scores: all numbers, for ``--json``.
        write: writes the report into a folder.
        remarks: lines that ``--quiet`` leaves out.
        written: what else was written, a line each.
    """

    headline: str
    lines: Sequence[str]
    scores: Mapping[str, Any]
    write: Callable[[Path], None]
    remarks: Sequence[str] = ()
    written: Sequence[str] = ()


class TaskCommands(ABC):
    """The part of the commands that differs by task."""

    noun: ClassVar[str]
    """What to call a model of this task: "classifier"."""
    eval_options: ClassVar[Sequence[Option]] = ()
    """Options of ``qtvit eval`` that are for this task and not for all."""
    predict_options: ClassVar[Sequence[Option]] = ()
    """Options of ``qtvit predict`` that are for this task and not for all."""
    check_options: ClassVar[Sequence[Option]] = ()
    """Options of ``qtvit data check`` that are for this task and not for all."""
    quickstart: ClassVar[Quickstart | None] = None
    """The training of ``qtvit quickstart``; None if the task has none."""
    sheet_side: ClassVar[int] = 176
    """Pixels of a picture on a sheet."""

    @abstractmethod
    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        """Read the data of ``args``; returns the function that scores ``predictor`` on them."""

    @abstractmethod
    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        """What the model makes of each file; None for one that is skipped."""

    @abstractmethod
    def line(self, prediction: Any, predictor: Any) -> str:
        """What to print of an image."""

    @abstractmethod
    def row(self, prediction: Any) -> dict[str, Any]:
        """What to write of an image into a JSON file."""

    @abstractmethod
    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        """The image as it is to be saved, and captions for it."""

    def mask(self, prediction: Any) -> Any:
        """A picture of labels, to be saved as PNG beside a large picture; None for tasks without such."""
        return None

    def write_csv(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write what `row` gave as a table; for tasks with an option ``--csv``."""
        raise NotImplementedError
