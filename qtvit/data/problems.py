"""Reports of everything that is wrong with a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NUM_SHOWN = 10
"""Number of entries of each list that a report prints."""


@dataclass(frozen=True)
class ProblemReport:
    """Result of checking a data set.

    Attributes:
        summary: lines that describe the data set.
        problems: entries by heading; each entry names its file and id.
    """

    summary: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_problems(self) -> int:
        """Number of entries under all headings."""
        return sum(map(len, self.problems.values()))

    def lines(self) -> list[str]:
        """The report as text, with at most `NUM_SHOWN` entries under each heading."""
        return [*self.summary, *problem_lines(self.problems), verdict(self.num_problems)]

    def raise_if_any(self, command: str) -> None:
        """Raise a ValueError with the first problem, if there is any; ``command`` is the one that lists all."""
        entries = [entry for group in self.problems.values() for entry in group]
        if len(entries) == 1:
            raise ValueError(entries[0])
        if entries:
            raise ValueError(f"{entries[0]}; and {len(entries) - 1} more problems: `{command}` lists them")


def problem_lines(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Each heading with its number of entries, followed by at most `NUM_SHOWN` of them."""
    lines = []
    for title, entries in problems.items():
        if entries:
            lines += [f"{len(entries)} problem{'s' * (len(entries) != 1)}: {title}"]
            lines += [f"  {entry}" for entry in entries[:NUM_SHOWN]]
            lines += [f"  and {len(entries) - NUM_SHOWN} more"] if len(entries) > NUM_SHOWN else []
    return lines


def verdict(num_problems: int) -> str:
    """The last line of a report."""
    return f"{num_problems or 'no'} problem{'s' * (num_problems != 1)} found"
