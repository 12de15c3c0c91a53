"""What the commands share: types of options, output files, names."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What parsers of commands are added to."""

RUN = "run folder, model file, hf-hub:USER/MODEL, or nano-cifar10, which comes with qtvit"
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")


def positive(text: str) -> int:
    """An option's number that has to be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def new_file(text: str) -> Path:
    """An option's path of a file to write."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def pictures(text: str) -> Path:
    """An option's path of pictures to write: a sheet's file, or a folder."""
    path = Path(text)
    if path.suffix.lower() in SHEET_SUFFIXES:
        return new_file(text)
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is a file; expected a folder, or a file that ends in .png or .jpg")
    return path


TYPES: dict[str, Callable[[str], Any]] = {"positive": positive, "new_file": new_file}
"""Types of options that tasks have, by the names that they use for them."""


def add_task_options(parser: argparse.ArgumentParser, which: str) -> None:
    """Add the options ``which`` ("eval_options", …) of every task, each once, named by the models it is for."""
    from qtvit import tasks

    added: set[str] = set()
    for task in tasks.TASKS.values():
        commands = task.load("commands")
        for option in getattr(commands, which):
            if option.flag not in added:
                settings = dict(option.settings)
                if isinstance(settings.get("type"), str):
                    settings["type"] = TYPES[settings["type"]]
                parser.add_argument(option.flag, default=None, help=f"{commands.noun}: {option.help}", **settings)
            added.add(option.flag)


def take_task_options(
    args: argparse.Namespace, which: str, task: str, problem: Callable[[str, str], str]
) -> dict[str, Any]:
    """The values of a task's options ``which``, with defaults filled in, in ``args`` too.

    Raises:
        ValueError: an option of another task is given; ``problem`` makes the message of it and that task.
    """
    from qtvit import tasks

    own = {option.flag: option for option in getattr(tasks.get(task).load("commands"), which)}
    for other in tasks.TASKS.values():
        for option in getattr(other.load("commands"), which):
            if option.flag not in own and getattr(args, option.name) is not None:
                raise ValueError(problem(option.flag, other.name))
    values = {}
    for option in own.values():
        given = getattr(args, option.name)
        values[option.name] = option.default if given is None else given
        setattr(args, option.name, values[option.name])
    return values


def make_parent(path: Path | None) -> None:
    """The folder of an output file, made and tried out before the work that the file is to hold."""
    from qtvit.files import open_folder

    if path is not None:
        open_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` to ``path`` and say so."""
    from qtvit.files import write_text

    write_text(path, json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")


def command_name() -> str:
    """What to type for ``qtvit``: make calls the command by its path."""
    called = Path(sys.argv[0])
    return "qtvit" if shutil.which("qtvit") or called.name != "qtvit" else str(called)


def run_name(run: str) -> str:
    """What to call the run or model that a command was given: the folder of the former, the file of the latter."""
    from qtvit.checkpoints import BEST

    path = Path(run).resolve()
    path = path.parent if path.name == BEST else path
    return path.name if path.is_dir() else path.stem
