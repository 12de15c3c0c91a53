"""What the commands share: option types, options of tasks, output files and names."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `argparse.ArgumentParser.add_subparsers` returns: parsers of commands are added to it."""

RUN = "run folder, model file, hf-hub:USER/MODEL, or nano-cifar10, which comes with qtvit"
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")


def positive(text: str) -> int:
    """Option type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def new_file(text: str) -> Path:
    """Option type: path of a file to write."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def pictures(text: str) -> Path:
    """Option type: path of pictures to write, either the file of a contact sheet or a folder."""
    path = Path(text)
    if path.suffix.lower() in SHEET_SUFFIXES:
        return new_file(text)
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is a file; expected a folder, or a file that ends in .png or .jpg")
    return path


TYPES: dict[str, Callable[[str], Any]] = {"positive": positive, "new_file": new_file}
"""Option types by the names that tasks use for them."""


def add_task_options(parser: argparse.ArgumentParser, which: str) -> None:
    """Add the options ``which`` ("eval_options", …) of all tasks, each once; the help says which models it is for."""
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


def take_task_options(args: argparse.Namespace, which: str, task: str, run: str = "") -> dict[str, Any]:
    """The values of the options ``which`` of ``task``; defaults are filled in, in ``args`` too.

    Raises:
        ValueError: an option of another task is given. The message says that ``run``, if there is one, has no such
            option, otherwise that --task has none.
    """
    from qtvit import tasks

    own = {option.flag: option for option in getattr(tasks.get(task).load("commands"), which)}
    for other in tasks.TASKS.values():
        for option in getattr(other.load("commands"), which):
            if option.flag not in own and getattr(args, option.name) is not None:
                if run:
                    raise ValueError(f"{option.flag} is not for a model that was trained to {task}, as {run}")
                raise ValueError(f"{option.flag} is for --task {other.name}, not {task}")
    for option in own.values():
        if getattr(args, option.name) is None:
            setattr(args, option.name, option.default)
    return pick(args, *(option.name for option in own.values()))


def pick(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options ``names``, as keyword arguments for a function that calls them the same."""
    return {name: getattr(args, name) for name in names}


def make_parent(path: Path | None) -> None:
    """Create the folder of an output file and check that it is writable, before the work whose result goes there."""
    from qtvit.files import open_folder

    if path is not None:
        open_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` to ``path`` as JSON and print the path."""
    from qtvit.files import write_text

    write_text(path, json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")


def command_name() -> str:
    """The command to suggest to users: ``qtvit``, or its path where it is not on PATH, as when make calls it."""
    called = Path(sys.argv[0])
    return "qtvit" if shutil.which("qtvit") or called.name != "qtvit" else str(called)


def run_name(run: str) -> str:
    """A short name for the run or model that a command was given: of its folder or its file."""
    from qtvit.checkpoints import BEST

    path = Path(run).resolve()
    path = path.parent if path.name == BEST else path
    return path.name if path.is_dir() else path.stem
