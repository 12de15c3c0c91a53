"""The report of an evaluation: scores and pictures in a folder, and a table for the terminal."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from qtvit.console import shorten
from qtvit.data.split import Sample
from qtvit.files import write_text
from qtvit.training.tables import MAX_ROWS, NAME_CHARS, NUM_WORST

from .evaluate import ClassScores, Evaluation
from .plots import plot_calibration, plot_confusion, plot_mistakes, plot_predictions


def write_report(
    evaluation: Evaluation, samples: Sequence[Sample], folder: Path, about: Mapping[str, object] | None = None
) -> None:
    """Write scores.json, per_class.csv, confusion.png, calibration.png, mistakes.png and predictions.png.

    ``samples`` are the images of the evaluation, in its order; ``about`` has further entries for scores.json.
    """
    write_text(folder / "scores.json", json.dumps(scores(evaluation, about), indent=2) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(ClassScores)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in evaluation.per_class())
    write_text(folder / "per_class.csv", table.getvalue())
    plot_confusion(evaluation, folder / "confusion.png")
    plot_calibration(evaluation, folder / "calibration.png")
    plot_mistakes(evaluation, samples, folder / "mistakes.png")
    plot_predictions(evaluation, samples, folder / "predictions.png")


def scores(evaluation: Evaluation, about: Mapping[str, object] | None = None) -> dict[str, object]:
    """All numbers of an evaluation, for JSON, after the entries of ``about``."""
    return {
        **(about or {}),
        **evaluation.metrics(),
        "per_class": [asdict(row) for row in evaluation.per_class()],
        "calibration": [asdict(row) for row in evaluation.calibration()],
    }


def headline(evaluation: Evaluation) -> str:
    """The main scores in one line; top-5 only if there are more than five classes."""
    top5 = f"   top-5 {evaluation.accuracy(5):.2f} %" if len(evaluation.classes) > 5 else ""
    num = len(evaluation.targets)
    ece = f"ECE {evaluation.calibration_error():.2f} %   of {num} image{'s' * (num != 1)}"
    return f"top-1 {evaluation.accuracy():.2f} %{top5}   {ece}"


def class_table(evaluation: Evaluation) -> list[str]:
    """Table of the scores of the classes and their means in percent; of many classes only those with lowest recall."""
    rows = evaluation.per_class()
    known = [row for row in rows if row.recall is not None]
    shown = rows if len(rows) <= MAX_ROWS else sorted(known, key=lambda row: row.recall or 0)[:NUM_WORST]
    mean = f"mean of {len(known)} class{'es' * (len(known) != 1)}"
    width = min(max(len(name) for name in [mean, *(row.label for row in shown)]), NAME_CHARS)

    def line(name: str, *cells: object, last: str = "") -> str:
        return f"{shorten(name, width):<{width}}" + "".join(f"{cell!s:>13}" for cell in cells) + f"   {last}".rstrip()

    lines = [line("class", "images", "recall %", "precision %", "F1 %", last="most often taken for")]
    for row in shown:
        scores = ["–" if score is None else f"{score:.2f}" for score in (row.recall, row.precision, row.f1)]
        taken = f"{shorten(row.taken_for, NAME_CHARS)} ({row.num_taken})" if row.taken_for else ""
        lines.append(line(row.label, row.num_images, *scores, last=taken))
    means = [sum(getattr(row, name) for row in known) / len(known) for name in ("recall", "precision", "f1")]
    lines.append(line(mean, len(evaluation.targets), *(f"{value:.2f}" for value in means)))
    if len(shown) < len(rows):
        lines.append(f"these are the {len(shown)} classes with the lowest recall; per_class.csv has all {len(rows)}")
    return lines
