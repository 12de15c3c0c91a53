"""Output of commands: lines and progress bars, unless they are quiet."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_quiet = ContextVar("quiet", default=False)


@contextmanager
def quiet(enable: bool = True) -> Iterator[None]:
    """Silence `say` and `progress` within this context (the option ``--quiet``)."""
    token = _quiet.set(enable)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether `say` and `progress` are silenced."""
    return _quiet.get()


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    if not is_quiet():
        result(line)


def result(line: str) -> None:
    """Print a line even with ``--quiet``: what the user asked for."""
    if sys.stdout is not None:  # None in a process without a console
        tqdm.write(line)
        sys.stdout.flush()


def progress(items: Iterable[T], *, total: int | None = None, desc: str | None = None, unit: str = "it") -> Iterable[T]:
    """Iterate with a progress bar that disappears at the end; there is none without a terminal."""
    return tqdm(items, total=total, desc=desc, unit=unit, leave=False, disable=True if is_quiet() else None)


def shorten(text: str, num_chars: int) -> str:
    """``text``, cut to at most ``num_chars`` characters, of which the last is then an ellipsis."""
    return text if len(text) <= num_chars else text[: num_chars - 1].rstrip() + "…"
