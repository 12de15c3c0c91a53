"""Messages for names that do not exist."""

import difflib
from collections.abc import Iterable, Sequence


def some(names: Sequence[object], limit: int = 5) -> str:
    """The first ``limit`` of ``names``, each shortened, and the number of others."""
    shown = ", ".join(name if len(name) <= 80 else f"{name[:79]}…" for name in map(str, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """A ValueError for an unknown ``kind`` of thing, with similar names among the ``known`` ones, or some or all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    some = ", ".join(known) if len(known) <= 30 else f"{', '.join(known[:10])}, … ({len(known)} in all)"
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {some}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")
