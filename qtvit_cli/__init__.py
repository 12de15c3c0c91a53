"""The ``qtvit`` command, with one module for each group of commands.

It is a package beside ``qtvit`` because importing ``qtvit`` takes seconds, as it registers models with timm, and
``qtvit --help`` should not. Each command imports what it needs when it runs.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .bench import add_bench
from .data import add_data
from .deploy import add_deploy
from .train import add_train
from .use import add_use
from .weights import add_weights

USER_ERRORS = (ValueError, OSError, FloatingPointError)
DEPLOY = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
"""Packages that the extra ``deploy`` installs; all others that may be missing belong to ``train``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``argv``; returns 0, or 2 after one line on stderr about an error that the user can fix."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, first = "--debug" in argv, os.environ.get("RANK", "0") == "0"
    quiet = "--quiet" in argv or not first  # of several processes under torchrun, only the first prints
    args, rest = _parser().parse_known_args([arg for arg in argv if arg not in ("--debug", "--quiet")])
    args.rest, args.argv = rest, argv
    if rest and not getattr(args, "own_options", False):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from qtvit import console

        with console.quiet(quiet):
            return args.command(args) or 0
    except KeyboardInterrupt as stop:
        if first:
            print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has stopped, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("qtvit"):
            raise
        package = (error.name or str(error)).partition(".")[0]
        extra = "deploy" if package in DEPLOY else "train"
        print(f"qtvit: error: {package} is not installed; pip install 'qtvit[{extra}]'", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        if debug:
            raise
        if first or isinstance(error, FloatingPointError):
            print(f"qtvit: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """The message of ``error`` in one line; for an error from a DataLoader process, its original message."""
    message = str(error) or type(error).__name__
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


class _OptionParser(argparse.ArgumentParser):
    """Does not accept abbreviated options, which hide misspellings; neither do its subparsers, which have this class.

    It also accepts ``--at -5,80`` as an option and its value, as argparse accepts ``--at -5``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.complete: Callable[[], None] | None = None
        """Called before the first parsing: adds the options of tasks, whose registry takes seconds to import."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        complete, self.complete = self.complete, None
        if complete is not None:
            complete()
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            if joined and joined[-1].startswith("--") and re.fullmatch(r"-[\d.]+,.*", arg):
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        return super().parse_known_args(joined, namespace)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _OptionParser(
        prog="qtvit",
        description="QT-ViT: vision backbones with quadratic-Taylor linear attention. See also `qtvit COMMAND --help`.",
        epilog="With any command: --quiet prints results alone, no progress; --debug shows the traceback of an error.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_train, add_use, add_deploy, add_weights, add_data, add_bench):
        add(commands)
    return parser
