"""The ablations of the paper as data: what each row changes, and the number that the paper has for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtvit.errors import unknown_name
from qtvit.ops import KERNELS

from .table3 import TABLE3_KERNELS


@dataclass(frozen=True)
class Row:
    """One variant of the model.

    Attributes:
        model_args: arguments of the model that make it this variant.
        paper: top-1 in percent that the paper reports for it, on ImageNet-1k with QT-ViT-1.
    """

    model_args: Mapping[str, Any]
    paper: float | None = None


@dataclass(frozen=True)
class Table:
    """Variants that are trained alike.

    Attributes:
        title: what they differ in.
        default: the row that is the model as it is built by default, and that the others are compared with.
        rows: by name.
    """

    title: str
    default: str
    rows: Mapping[str, Row]

    def select(self, names: Sequence[str] | None) -> list[str]:
        """The rows of these names (None: all), the default in any case, in the table's order.

        Raises:
            ValueError: there is no such row, or a name is empty.
        """
        for name in names or ():
            if not name:
                raise ValueError(f"the name of a row is empty; known: {', '.join(self.rows)}")
            if name not in self.rows:
                raise unknown_name("row", name, self.rows)
        return [name for name in self.rows if names is None or name in (*names, self.default)]


_TABLE2 = {
    "softmax": 79.8,
    "relu": 79.4,
    "cosine": 79.1,
    "mean": 78.8,
    "aft": 78.9,
    "angular": 79.1,
    "taylor1": 78.5,
    "taylor2": 79.6,
}
_TABLE3 = {"full": 79.7, "pool2": 79.3, "pool4": 79.1, "chunk2": 79.4, "chunk4": 79.3, "chunk8": 79.1, "random": 61.8}

TABLES: dict[str, Table] = {
    "table2": Table(
        "kernels (Table 2 of the paper)",
        "taylor2",
        {name: Row({"kernel": name}, _TABLE2.get(name)) for name in KERNELS if name not in TABLE3_KERNELS},
    ),
    "table3": Table(
        "reductions of the Kronecker product (Table 3 of the paper)",
        "self",
        {
            "self": Row({"kernel": "taylor2"}, 79.6),
            **{name: Row({"kernel": f"table3_{name}"}, paper) for name, paper in _TABLE3.items()},
        },
    ),
    "table7": Table(
        "masked softmax attention added in training (Table 7 of the paper)",
        "without",
        {"without": Row({"softmax_residual": None}, 79.6), "with": Row({"softmax_residual": 0.02}, 79.8)},
    ),
    "ape": Table(
        "positional maps on the keys (for classification the paper has no such table)",
        "with",
        {"with": Row({"ape": True}), "without": Row({"ape": False})},
    ),
    "shortcut": Table(
        "the non-linear shortcut (the paper has no such table)",
        "with",
        {"with": Row({"shortcut": True}), "without": Row({"shortcut": False})},
    ),
}


def get_table(name: str) -> Table:
    """The table of that name; ValueError with the known names if there is none."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]
