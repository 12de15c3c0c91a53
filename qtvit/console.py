"""What is said while work goes on: lines and progress bars, or nothing at all."""

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
    """Within this context `say` and `progress` keep silent (the command's ``--quiet``)."""
    token = _quiet.set(enable)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether `quiet` is in force."""
    return _quiet.get()


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    if not is_quiet():
        result(line)


def result(line: str) -> None:
    """As `say`, but in any case: for what was asked for."""
    if sys.stdout is not None:  # a daemon may have none
        tqdm.write(line)
        sys.stdout.flush()


def progress(items: Iterable[T], *, total: int | None = None, desc: str | None = None, unit: str = "it") -> Iterable[T]:
    """``items`` with a progress bar that goes when they end; without a terminal there is none."""
    return tqdm(items, total=total, desc=desc, unit=unit, leave=False, disable=True if is_quiet() else None)


def shorten(text: str, num_chars: int) -> str:
    """``text``, cut to ``num_chars`` characters, the last of which then is an ellipsis."""
    return text if len(text) <= num_chars else text[: num_chars - 1].rstrip() + "…"
