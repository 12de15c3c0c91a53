import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from qtvit.bench import pareto, plots
from qtvit.bench.pareto import bench_pareto, choose, pareto_front, published_results
from qtvit.bench.plots import place_labels
from qtvit.models import PUBLISHED_ACCURACY
from qtvit_cli import main

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]


def test_the_published_results_are_of_models_that_there_are() -> None:
    results = published_results()
    assert len({(each.model, each.img_size) for each in results}) == len(results) > 60
    for each in results:
        assert timm.is_model(each.model), each
        assert 50 < each.top1 < 90
        size = timm.get_pretrained_cfg(each.model).test_input_size or timm.get_pretrained_cfg(each.model).input_size
        assert each.img_size % 4 == 0
        assert each.img_size <= max(size), each
    assert {each.model: each.top1 for each in results if each.family == "QT-ViT"} == {
        name: top1 for name, (top1, _) in PUBLISHED_ACCURACY.items()
    }


def test_choosing() -> None:
    assert {each.model for each in choose(["efficientvit_b1"])} == {
        f"efficientvit_b1.r{s}_in1k" for s in (224, 256, 288)
    }
    assert [each.model for each in choose(["qtvit_[12]", "qtvit_1"])] == ["qtvit_1", "qtvit_2"]
    assert {each.family for each in choose(["Swin", "SHViT"])} == {"Swin", "SHViT"}
    assert "qtvit_6" not in {each.model for each in choose([])}
    assert [each.model for each in choose(["qtvit_6"])] == ["qtvit_6"]


def test_the_front_by_hand() -> None:
    assert pareto_front([70, 69, 70, 75, 74, 76]) == [True, False, False, True, False, True]


def test_latencies_are_in_the_peers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second group is measured while the machine is ten times as slow."""
    factors = iter([1.0, 10.0])

    def fake(runs: dict[Any, Any], **options: Any) -> dict[Any, list[float]]:
        factor = next(factors)
        return {name: [factor * (i + 1)] * 3 for i, name in enumerate(runs)}

    monkeypatch.setattr("qtvit.bench.latency.in_turns", fake)
    monkeypatch.setattr(pareto, "GROUP", 2)
    result = bench_pareto(["efficientvit_m[012]"], "efficientvit_m5", rounds=2)
    assert result["peer_seconds"] == [1.0] * 3 + [10.0] * 3
    typical = statistics.median(result["peer_seconds"])
    ratios = {row["label"]: row["latency_seconds"] / typical for row in result["rows"]}
    assert ratios == pytest.approx({"efficientvit_m0 224": 2, "efficientvit_m1 224": 3, "efficientvit_m2 224": 2})


def test_accuracy_against_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "front"
    argv = f"bench pareto qtvit_1 efficientvit_m[02] --peer qtvit_nano --rounds 2 --threads 1 --output {out}"
    assert main(argv.split()) == 0
    result = json.loads((tmp_path / "front.json").read_text())
    rows = result["rows"]
    assert {row["label"] for row in rows} == {"qtvit_1 224", "efficientvit_m0 224", "efficientvit_m2 224"}
    assert [row["latency_seconds"] for row in rows] == sorted(row["latency_seconds"] for row in rows)
    assert [row["on_front"] for row in rows] == pareto_front([row["published_top1"] for row in rows])
    assert next(row["published_top1"] for row in rows if row["family"] == "QT-ViT") == 79.6
    assert len(result["peer_seconds"]) == 2
    assert all(len(row["seconds"]) == 2 for row in rows)
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.width > 1000
    printed = capsys.readouterr().out
    assert "*" in printed
    assert "Accuracy is as published, not measured here." in printed


def test_the_size_is_that_of_the_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "measure", lambda entries, *rest: [entry.row | STAND_IN for entry in entries])
    result = bench_pareto(["shvit_s4", "tf_efficientnetv2_b1"], "qtvit_nano", rounds=2)
    assert {row["label"]: row["img_size"] for row in result["rows"]} == {
        "shvit_s4 256": [256, 256],
        "tf_efficientnetv2_b1 240": [240, 240],
    }


STAND_IN = {"seconds": [1.0], "ratio": {"median": 1.0, "low": 1.0, "high": 1.0}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("efficientvit_b9", "unknown model with a published result 'efficientvit_b9'; did you mean efficientvit_b"),
        ("--peer zzz", "unknown model 'zzz'"),
        ("--runtime eager --precision int4", "unknown precision 'int4'"),
        ("--runtime onnxruntime --precision bf16", "onnxruntime has no bf16"),
        ("--rounds 1", "needs two rounds"),
    ],
)
def test_mistakes(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "pareto", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_names_cover_neither_each_other_nor_points(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(6, 6))
    axes = figure.subplots()
    points = [(x / 10, y / 10) for x in range(1, 10, 2) for y in range(1, 10, 2)] + [(0.11, 0.11), (0.5, 0.51)]
    axes.scatter(*zip(*points, strict=True))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    names = [f"model_{i}" for i in range(len(points))]
    place_labels(axes, points, names, ["black"] * len(points), [i % 2 == 0 for i in range(len(points))])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text).extents for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == sorted(names)
    pixels = axes.transData.transform(points)
    for i, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[:i])
        assert not any(overlap(box, (x, y, x, y)) for x, y in pixels)


def test_a_name_without_a_place_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "RADII", (7,))
    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    place_labels(axes, [(0.5, 0.5)] * 40, ["a_long_name"] * 40, ["black"] * 40, [False] * 40)
    assert 1 <= len(axes.texts) < 40


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] - 0.5 and b[0] < a[2] - 0.5 and a[1] < b[3] - 0.5 and b[1] < a[3] - 0.5
