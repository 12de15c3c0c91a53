"""The ``qtvit`` command: one module for each group of commands.

It stands beside the package, not in it: importing ``qtvit`` registers models with timm, which takes seconds, and
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
"""Packages of the extra of that name; others that may be missing are of ``train``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``; 0 if it worked, 2 with one line on stderr if the user has to change something."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, first = "--debug" in argv, os.environ.get("RANK", "0") == "0"
    quiet = "--quiet" in argv or not first  # of torchrun's processes, one speaks
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
    except BrokenPipeError:  # as after `| head`: nobody reads on
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
    """The message of ``error``; of one that a loader process passed on, the message it was raised with."""
    message = str(error) or type(error).__name__
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


class _OptionParser(argparse.ArgumentParser):
    """Takes nothing misspelt for the abbreviation of an option; nor do the parsers of its commands, which are such.

    And takes ``--at -5,80`` for an option with its value, as argparse does ``--at -5``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.complete: Callable[[], None] | None = None
        """Adds what the registry of tasks knows, which takes seconds to import; called before the first parsing."""

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
