import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from qtvit.models import build_model
from qtvit.tasks.classify.evaluate import ClassScores, Evaluation
from qtvit.tasks.classify.plots import plot_calibration, plot_confusion, plot_mistakes
from qtvit.tasks.classify.report import class_table, headline, write_report
from qtvit.training.optim import parameter_groups, warmup_cosine


def by_hand() -> Evaluation:
    """Four images of three classes, of which the third has none; the last two are predicted wrong."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.55, 0.35], [0.5, 0.3, 0.2], [0.2, 0.22, 0.58]])
    return Evaluation(["a", "b", "c"], torch.tensor([0, 1, 1, 0]), probabilities, 1.0)


def random(num_classes: int, num_images: int, names: list[str] | None = None) -> Evaluation:
    """An evaluation that is right about half of the time."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(num_classes, (num_images,), generator=generator)
    logits = 2 * torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), targets] += math.log(num_classes) + 1
    return Evaluation(names or [f"class {i}" for i in range(num_classes)], targets, logits.softmax(-1), 1.0)


def test_accuracy_and_confusion_by_hand() -> None:
    evaluation = by_hand()
    assert evaluation.accuracy(1) == 50
    assert evaluation.accuracy(2) == 75
    assert evaluation.accuracy(5) == 100
    assert evaluation.confusion().tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_scores_of_the_classes_by_hand() -> None:
    a, b, c = by_hand().per_class()
    assert a == ClassScores("a", 2, recall=50, precision=50, f1=50, taken_for="c", num_taken=1)
    assert b == ClassScores("b", 2, recall=50, precision=100, f1=66.6667, taken_for="a", num_taken=1)
    assert c == ClassScores("c", 0, recall=None, precision=None, f1=None, taken_for=None, num_taken=0)


def test_a_class_without_images_does_not_count_in_the_means() -> None:
    assert by_hand().balanced_accuracy() == 50
    *_, absent, mean = class_table(by_hand())
    assert absent.split() == ["c", "0", "–", "–", "–"]
    assert mean.split() == ["mean", "of", "2", "classes", "4", "50.00", "75.00", "58.33"]


def test_calibration_by_hand() -> None:
    evaluation = by_hand()
    bins = {row.low: row for row in evaluation.calibration()}
    assert len(bins) == 15
    assert sum(row.num_images for row in bins.values()) == 4
    # 0.5 is in (0.467, 0.533]; 0.55 and 0.58 in (0.533, 0.6]; 0.7 in (0.667, 0.733]
    assert [low for low, row in bins.items() if row.num_images] == [46.6667, 53.3333, 66.6667]
    assert (bins[53.3333].num_images, bins[53.3333].accuracy) == (2, 50)
    assert bins[53.3333].confidence == pytest.approx(56.5, abs=1e-3)
    assert bins[0].accuracy is None
    assert evaluation.calibration_error() == pytest.approx((50 + 2 * 6.5 + 30) / 4, abs=1e-3)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    evaluation = random(7, 500)
    theirs = 100 * multiclass_calibration_error(evaluation.probabilities, evaluation.targets, 7, n_bins=15)
    assert evaluation.calibration_error() == pytest.approx(float(theirs), abs=1e-3)


def test_certainty_is_in_the_last_bin() -> None:
    evaluation = Evaluation(["a", "b"], torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1.0)
    assert evaluation.calibration()[-1].num_images == 2
    assert evaluation.calibration_error() == 50
    assert math.isfinite(evaluation.loss())


def test_loss_by_hand() -> None:
    expected = -(math.log(0.7) + math.log(0.55) + math.log(0.3) + math.log(0.2)) / 4
    assert by_hand().loss() == pytest.approx(expected)


def test_mistakes_come_with_the_most_confident_first() -> None:
    assert by_hand().mistakes() == [3, 2]
    assert by_hand().mistakes(1) == [3]


def test_top5_is_said_where_it_can_be_wrong() -> None:
    assert headline(by_hand()) == "top-1 50.00 %   ECE 23.25 %   of 4 images"
    assert "top-5" in headline(random(6, 20))


def test_the_table_of_many_classes_has_the_worst() -> None:
    evaluation = random(60, 900)
    header, *rows, mean, note = class_table(evaluation)
    assert header.split()[:2] == ["class", "images"]
    recalls = [float(row.split()[3]) for row in rows]
    assert recalls == pytest.approx(sorted(row.recall for row in evaluation.per_class())[:10], abs=0.01)
    assert mean.startswith("mean of 60 classes")
    assert "per_class.csv has all 60" in note


@pytest.mark.parametrize("num_classes", [2, 3, 60, 1000])
def test_pictures_are_drawn_of_any_number_of_classes(
    num_classes: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    names = ["猫", r"$\foo$", *(f"class {i} with a name that is too long for any axis" for i in range(2, num_classes))]
    evaluation = random(num_classes, 3 * num_classes, names)
    plot_confusion(evaluation, tmp_path / "confusion.png")
    plot_calibration(evaluation, tmp_path / "calibration.png")
    assert not recwarn.list
    for name in ("confusion.png", "calibration.png"):
        with Image.open(tmp_path / name) as picture:
            assert 400 < max(picture.size) < 2500


def test_a_large_confusion_matrix_without_mistakes(tmp_path: Path) -> None:
    targets = torch.arange(50)
    plot_confusion(Evaluation([str(i) for i in range(50)], targets, torch.eye(50), 1.0), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").is_file()


def test_classes_that_do_not_occur_are_not_drawn(tmp_path: Path) -> None:
    some = by_hand()
    padded = Evaluation(
        [*some.classes, *map(str, range(997))],
        some.targets,
        torch.cat([some.probabilities, torch.zeros(4, 997)], dim=1),
        1.0,
    )
    plot_confusion(some, tmp_path / "some.png")
    plot_confusion(padded, tmp_path / "padded.png")
    assert (tmp_path / "some.png").read_bytes() == (tmp_path / "padded.png").read_bytes()


def test_a_report_holds_what_the_evaluation_says(tmp_path: Path) -> None:
    samples = [
        (Image.new("RGB", (8, 8), color), label)
        for color, label in zip(("red", "green", "blue", "black"), [0, 1, 1, 0], strict=True)
    ]
    write_report(by_hand(), samples, tmp_path, {"data": "mine"})
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["data"], scores["top1"], scores["num_images"], scores["ece"]) == (
        "mine",
        50,
        4,
        pytest.approx(23.25, abs=1e-3),
    )
    assert [row["recall"] for row in scores["per_class"]] == [50, 50, None]
    assert sum(row["num_images"] for row in scores["calibration"]) == 4
    with (tmp_path / "per_class.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["num_images"], row["precision"]) for row in rows] == [
        ("a", "2", "50.0"),
        ("b", "2", "100.0"),
        ("c", "0", ""),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.json", "per_class.csv", "confusion.png", "calibration.png", "mistakes.png", "predictions.png",
    }  # fmt: skip


def test_without_mistakes_the_least_certain_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    monkeypatch.setattr(
        "qtvit.tasks.classify.plots.contact_sheet", lambda tiles, title: shown.update(x=(tiles, title)) or tile
    )
    tile = Image.new("RGB", (8, 8))
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    evaluation = Evaluation(["a", "b"], torch.tensor([0, 1, 1]), probabilities, 1.0)
    plot_mistakes(evaluation, [(tile, 0), (tile, 1), (tile, 1)], tmp_path / "mistakes.png", num_images=2)
    tiles, title = shown["x"]
    assert title == "No mistakes in 3 images; these are the least certain"
    assert [list(tile.lines) for tile in tiles] == [["60% b"], ["80% b"]]


def test_learning_rate_rises_then_falls() -> None:
    factors = [warmup_cosine(step, num_steps=10, num_warmup=4) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[10] == pytest.approx(0)


def test_decay_follows_the_released_names() -> None:
    model = build_model("qtvit_nano")
    exempt = model.no_weight_decay()
    assert {"stages.1.1.attn.proj.norm.weight", "stages.1.1.local.depth_conv.conv.bias", "head.norm.bias"} <= exempt
    decayed = {"stages.1.1.attn.scalars.c", "stages.1.1.attn.shortcut_norm.weight", "stages.1.1.attn.pos_embed"}
    assert not decayed & exempt
    without, with_decay = sorted(parameter_groups(model, 1e-3, 0.1), key=lambda group: group["weight_decay"])
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.1, 0.0)
    assert len(without["params"]) == len(exempt)
    assert len(with_decay["params"]) + len(without["params"]) == len(list(model.parameters()))
    assert len(parameter_groups(nn.Linear(2, 2), 1e-3, 0.1)) == 2
