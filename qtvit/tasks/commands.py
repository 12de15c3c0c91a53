"""Base class for the parts of ``qtvit eval``, ``predict``, ``data check`` and ``quickstart`` that differ by task."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Option:
    """A command-line option that only some tasks have.

    Attributes:
        flag: as in "--top-k".
        help: text for ``--help``.
        default: value if the option is not given.
        settings: further arguments of ``ArgumentParser.add_argument``; ``type`` may also be "positive", for an integer
            of at least 1, or "new_file", for the path of a file to write.
    """

    flag: str
    help: str
    default: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The option's attribute in the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Quickstart:
    """A training run on data that come with the package.

    Attributes:
        recipe: name of the recipe.
        next: text to print afterwards; {command}, {run} and {data} in it are replaced.
        scenes: folder into which sample scenes are written first; None if the recipe needs none.
        num_train, num_val: numbers of scenes.
    """

    recipe: str
    next: str
    scenes: str | None = None
    num_train: int = 0
    num_val: int = 0


@dataclass(frozen=True)
class EvalReport:
    """Result of an evaluation, in every form in which ``qtvit eval`` outputs it.

    Attributes:
        headline: the main scores in one line.
        lines: tables to print.
        scores: all numbers, for ``--json``.
        write: function that writes the report into a folder.
        remarks: lines that are printed unless ``--quiet`` is given.
        written: lines to print at the end, one for each further output that was written.
    """

    headline: str
    lines: Sequence[str]
    scores: Mapping[str, Any]
    write: Callable[[Path], None]
    remarks: Sequence[str] = ()
    written: Sequence[str] = ()


class TaskCommands(ABC):
    """The parts of the commands that differ by task."""

    noun: ClassVar[str]
    """Word for a model of this task, such as "classifier"."""
    eval_options: ClassVar[Sequence[Option]] = ()
    predict_options: ClassVar[Sequence[Option]] = ()
    check_options: ClassVar[Sequence[Option]] = ()
    """Options that ``qtvit eval``, ``predict`` and ``data check`` have for this task only."""
    quickstart: ClassVar[Quickstart | None] = None
    """What ``qtvit quickstart`` trains; None if the task has no quickstart."""
    sheet_side: ClassVar[int] = 176
    """Side of a picture on a contact sheet, in pixels."""

    @abstractmethod
    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        """Read the labelled data that ``args`` name; returns a function that scores ``predictor`` on them."""

    @abstractmethod
    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        """Yield the prediction for each file; None for a file that is skipped."""

    @abstractmethod
    def line(self, prediction: Any, predictor: Any) -> str:
        """Return the line to print for an image."""

    @abstractmethod
    def row(self, prediction: Any) -> dict[str, Any]:
        """Return an image's entry in the JSON file."""

    @abstractmethod
    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        """Return the image with the prediction drawn on it, and captions."""

    def mask(self, prediction: Any) -> Any:
        """Return a PNG picture of the labels, to save beside the large picture; None if the task has no masks."""
        return None

    def write_csv(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write the results of `row` as a table; only for tasks with an option ``--csv``."""
        raise NotImplementedError
