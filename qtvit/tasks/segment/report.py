"""The report of an evaluation of a segmenter: scores and pictures in a folder, and a table for the terminal."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path

from qtvit.console import shorten
from qtvit.deploy.annotate import Tile, contact_sheet, thumbnail
from qtvit.files import write_text
from qtvit.training.plots import draw_confusion
from qtvit.training.tables import MAX_ROWS, NAME_CHARS, NUM_WORST

from .data import SegmentationDataset
from .evaluate import Evaluation
from .predict import Segmentation
from .scores import RegionScores, SegmentationScores
from .transforms import SegmentationEvalTransform


def write_report(evaluation: Evaluation, folder: Path, about: Mapping[str, object] | None = None) -> None:
    """Write scores.json, per_class.csv, confusion.csv, confusion.png and predictions.png.

    Args:
        evaluation: what to report.
        folder: to write into.
        about: further entries of scores.json.
    """
    scores = evaluation.scores
    write_text(folder / "scores.json", json.dumps(all_scores(scores, about), indent=2) + "\n")
    header = [field.name for field in fields(RegionScores)]
    _write_csv(folder / "per_class.csv", [header, *map(astuple, scores.per_class())])
    counts = zip(scores.classes, scores.confusion.tolist(), strict=True)
    _write_csv(folder / "confusion.csv", [["true", *scores.classes], *([name, *row] for name, row in counts)])
    title = f"mIoU {scores.mean_iou():.2f} %, {scores.num_images} images"
    draw_confusion(scores.confusion, scores.classes, title, folder / "confusion.png", unit="pixels")
    draw_predictions(evaluation, folder / "predictions.png")


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_text(path, table.getvalue())


def all_scores(scores: SegmentationScores, about: Mapping[str, object] | None = None) -> dict[str, object]:
    """All numbers of an evaluation, for JSON."""
    return {**(about or {}), **scores.metrics(), "per_class": [asdict(row) for row in scores.per_class()]}


def headline(scores: SegmentationScores) -> str:
    """The scores in one line."""
    return (
        f"mIoU {scores.mean_iou():.2f} %   mAcc {scores.mean_accuracy():.2f} %   aAcc {scores.pixel_accuracy():.2f} %"
        f"   of {scores.num_images} image{'s' * (scores.num_images != 1)}"
    )


def class_table(scores: SegmentationScores) -> list[str]:
    """Lines of a table of the classes; if there are many, of those with the lowest IoU."""
    rows = scores.per_class()
    known = [row for row in rows if row.iou is not None]
    shown = rows if len(rows) <= MAX_ROWS else sorted(known, key=lambda row: row.iou or 0)[:NUM_WORST]
    width = min(max(len(name) for name in ["class", *(row.label for row in shown)]), NAME_CHARS)
    total = max(int(scores.confusion.sum()), 1)
    head = ("pixels %", "IoU %", "recall %", "precision %")
    lines = [f"{'class':<{width}}" + "".join(f"{name:>13}" for name in head) + "   most often taken for"]
    for row in shown:
        cells = [100 * row.num_pixels / total, row.iou, row.accuracy, row.precision]
        texts = ["–" if cell is None else f"{cell:.2f}" for cell in cells]
        taken = f"   {shorten(row.taken_for, NAME_CHARS)}" if row.taken_for else ""
        lines.append(f"{shorten(row.label, width):<{width}}" + "".join(f"{text:>13}" for text in texts) + taken)
    if len(shown) < len(rows):
        lines.append(f"these are the {len(shown)} classes with the lowest IoU; per_class.csv has all {len(rows)}")
    return lines


def draw_predictions(evaluation: Evaluation, out: Path) -> None:
    """Draw a sheet of images, each beside its mask and its prediction."""
    meaning = evaluation.data_classes
    samples = [sample for sample, _ in evaluation.kept]
    dataset = SegmentationDataset(samples, meaning, SegmentationEvalTransform())
    tiles = []
    for index, (sample, found) in enumerate(evaluation.kept):
        image, labels = dataset.read(index)
        true = Segmentation(labels.numpy(), meaning)
        for picture, name in ((image, sample.name), (true.color_image(), "mask"), (found.color_image(), "predicted")):
            tiles.append(Tile(thumbnail(picture), [name]))
    contact_sheet(tiles, f"{len(samples)} of {evaluation.scores.num_images} images", max_columns=6).save(out)
