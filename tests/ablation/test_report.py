"""The tables of ablations, and what is made of their runs' scores."""

from pathlib import Path
from typing import Any

import pytest

from qtvit.ablation.report import paired_difference, summarize, write_results
from qtvit.ablation.tables import TABLES, get_table
from qtvit.ops import KERNELS


def test_the_tables_are_those_of_the_paper() -> None:
    assert list(TABLES) == ["table2", "table3", "table7", "ape", "shortcut"]
    assert list(TABLES["table2"].rows) == list(KERNELS)
    paper = {name: row.paper for name, row in TABLES["table3"].rows.items()}
    assert paper["random"] == 61.8
    assert paper["full"] == 79.7
    assert all(table.default in table.rows for table in TABLES.values())
    assert TABLES["table7"].rows["with"].model_args == {"softmax_residual": 0.02}
    assert get_table("table3").select(["pool2"]) == ["self", "pool2"]


def test_the_difference_by_hand() -> None:
    difference = paired_difference({0: 71.0, 1: 74.0, 2: 72.0, 3: 60.0}, {0: 70.0, 1: 72.0, 2: 69.0})
    assert difference is not None
    assert (difference.mean, difference.seeds) == (2.0, [0, 1, 2])
    # Standard deviation 1 of three differences; the 97.5 % quantile of t with 2 degrees of freedom is 4.302653.
    assert difference.low == pytest.approx(2 - 4.302653 / 3**0.5)
    assert difference.high == pytest.approx(2 + 4.302653 / 3**0.5)
    one = paired_difference({0: 71.0}, {0: 70.0, 1: 72.0})
    assert one is not None
    assert (one.mean, one.low, one.high) == (1.0, None, None)
    assert paired_difference({0: 71.0}, {1: 70.0}) is None


def outcome(top1: float, speed: float = 100) -> dict[str, Any]:
    return {"top1": top1, "num_params": 9, "num_macs": 8, "train_images_per_second": speed}


def test_a_line_of_the_table_by_hand() -> None:
    outcomes = {
        "relu": {0: outcome(51, 10), 1: outcome(57, 30), 2: {"failed": "nan"}},
        "taylor2": {0: outcome(50), 2: outcome(90)},
    }
    taylor2, relu = summarize(TABLES["table2"], outcomes)
    assert (relu.mean, relu.sd) == (54.0, pytest.approx(18**0.5))
    assert (relu.images_per_second, relu.num_params, relu.num_macs) == (20, 9, 8)
    assert relu.difference == paired_difference({0: 51.0}, {0: 50.0})
    assert relu.failed == {2: "nan"}
    assert (taylor2.is_default, taylor2.difference, taylor2.paper_difference) == (True, None, None)


@pytest.mark.parametrize("outcomes", [{"taylor2": {0: {"failed": "nan"}}, "relu": {0: outcome(5)}}, {}])
def test_results_without_a_default_score(outcomes: Any, tmp_path: Path) -> None:
    settings = {"eval_every": 1, "epochs": 3, "model": None, "data": "digits"}
    lines = write_results(tmp_path, "table2", outcomes, settings, "qtvit ablate")
    assert lines[0].startswith("row")
    assert "chosen on the held-out images" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000
