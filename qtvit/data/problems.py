"""What is wrong with a data set, for a person to read: all of it at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NUM_SHOWN = 10
"""Entries of each list in a report."""


@dataclass(frozen=True)
class ProblemReport:
    """What a check of a data set has found.

    Attributes:
        summary: what the data set is, a line each.
        problems: what is wrong, as a heading and its entries, each of which names file and id.
    """

    summary: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_problems(self) -> int:
        """How many entries all lists have."""
        return sum(map(len, self.problems.values()))

    def lines(self) -> list[str]:
        """The report in words, `NUM_SHOWN` entries of each list."""
        return [*self.summary, *problem_lines(self.problems), verdict(self.num_problems)]

    def raise_if_any(self, command: str) -> None:
        """ValueError with the first problems, if there are any; ``command`` is what lists all of them."""
        entries = [entry for group in self.problems.values() for entry in group]
        if len(entries) == 1:
            raise ValueError(entries[0])
        if entries:
            raise ValueError(f"{entries[0]}; and {len(entries) - 1} more problems: `{command}` lists them")


def problem_lines(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Each heading with its number of entries, and `NUM_SHOWN` of these."""
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
