"""The report of an evaluation of a detector: scores and pictures in a folder, and tables for the terminal."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from qtvit.console import shorten
from qtvit.deploy.annotate import Tile, contact_sheet, thumbnail
from qtvit.files import write_text
from qtvit.training.plots import save
from qtvit.training.tables import MAX_ROWS, NAME_CHARS, NUM_WORST

from .coco_eval import FIGURES, KINDS
from .data import DetectionSamples, learnt_target, read_image
from .draw import draw_detections
from .evaluate import DetectionEvaluation
from .predict import SCORE_THRESHOLD, Detections, Result, read_output

SIDE = 320
"""Pixels of a picture's side on the sheet of predictions."""
MAX_LINES = 12
"""Largest number of categories for which each gets a precision-recall curve of its own."""
RESULTS = "results-{}.json"
"""Files of results in COCO's submission format, for bbox and segm."""


def write_detection_report(
    evaluation: DetectionEvaluation,
    samples: DetectionSamples,
    folder: Path,
    about: Mapping[str, object] | None = None,
    with_results: bool = False,
) -> None:
    """Write scores.json, per_category.csv, precision_recall.png and predictions.png, and the results if asked for.

    Args:
        evaluation: what to report.
        samples: the images that were evaluated.
        folder: to write into.
        about: further entries of scores.json.
        with_results: write results-bbox.json and results-segm.json too. These are two files because pycocotools takes
            the areas of masks from boxes if there are boxes.
    """
    write_text(folder / "scores.json", json.dumps(scores(evaluation, about), indent=2) + "\n")
    table = io.StringIO()
    rows = _rows(evaluation)
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "per_category.csv", table.getvalue())
    plot_precision_recall(evaluation, folder / "precision_recall.png")
    plot_found(evaluation, samples, folder / "predictions.png")
    if with_results:
        for iou_type, key in KINDS.values():
            if all(key in result for result in evaluation.results):
                names = ("image_id", "category_id", "score", key)
                content = [{name: result[name] for name in names} for result in evaluation.results]
                write_text(folder / RESULTS.format(iou_type), json.dumps(content) + "\n")


def scores(evaluation: DetectionEvaluation, about: Mapping[str, object] | None = None) -> dict[str, object]:
    """All numbers of an evaluation, for JSON."""
    counts = {"num_images": evaluation.num_images, "per_category": _rows(evaluation)}
    return {**(about or {}), **evaluation.metrics(), **counts}


def _rows(evaluation: DetectionEvaluation) -> list[dict[str, Any]]:
    """One row per category, with the scores of boxes and masks."""
    same = ("category_id", "label", "num_objects")
    rows: list[dict[str, Any]] = [
        {name: getattr(category, name) for name in same} for category in evaluation.scores["box"].per_category
    ]
    for kind, of_kind in evaluation.scores.items():
        for row, category in zip(rows, of_kind.per_category, strict=True):
            row |= {f"{kind}_{name}": value for name, value in asdict(category).items() if name not in same}
    return rows


def figure_table(evaluation: DetectionEvaluation) -> list[str]:
    """Lines of a table of COCO's twelve figures for boxes and for masks, in percent."""
    lines = [f"{'':<12}" + "".join(f"{kind + ' %':>9}" for kind in evaluation.scores)]
    for name in FIGURES:
        what, _, rest = name.partition("_")
        cells = "".join(f"{_show(of_kind.figures[name]):>9}" for of_kind in evaluation.scores.values())
        lines.append(f"{f'{what.upper()} {rest}'.rstrip():<12}" + cells)
    return lines


def category_table(evaluation: DetectionEvaluation) -> list[str]:
    """Lines of a table of the categories; if there are many, of those with the lowest box AP."""
    rows = _rows(evaluation)
    known = [row for row in rows if row["box_ap"] is not None]
    shown = rows if len(rows) <= MAX_ROWS else sorted(known, key=lambda row: row["box_ap"])[:NUM_WORST]
    columns = [(kind, name) for kind in evaluation.scores for name in ("ap", "ap50")]
    width = min(max(len("category"), *(len(row["label"]) for row in shown)), NAME_CHARS)
    heads = "".join(f"{f'{kind} {name.upper()} %':>13}" for kind, name in columns)
    lines = [f"{'category':<{width}}{'id':>8}{'objects':>9}" + heads]
    for row in shown:
        cells = "".join(f"{_show(row[f'{kind}_{name}']):>13}" for kind, name in columns)
        lines.append(f"{shorten(row['label'], width):<{width}}{row['category_id']:>8}{row['num_objects']:>9}{cells}")
    if len(shown) < len(rows):
        lines.append(f"these are the {len(shown)} with the lowest box AP; per_category.csv has all {len(rows)}")
    return lines


def headline(evaluation: DetectionEvaluation) -> str:
    """The scores in one line."""
    parts = [
        f"{kind} AP {_show(of_kind.figures['ap'])} %   AP50 {_show(of_kind.figures['ap50'])} %"
        for kind, of_kind in evaluation.scores.items()
    ]
    return "   ".join(parts) + f"   of {evaluation.num_images} image{'s' * (evaluation.num_images != 1)}"


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def plot_precision_recall(evaluation: DetectionEvaluation, out: Path) -> None:
    """Draw precision over recall for boxes and for masks: per category at IoU 0.5, and means of all at several IoUs."""
    figure = Figure(figsize=(6 * len(evaluation.scores), 5), layout="constrained")
    panels = figure.subplots(1, len(evaluation.scores), squeeze=False)[0]
    for axes, (kind, of_kind) in zip(panels, evaluation.scores.items(), strict=True):
        precision, recalls = of_kind.precision, of_kind.recalls
        present = [k for k in range(precision.shape[-1]) if precision[0, 0, k] > -1]
        if len(present) <= MAX_LINES:
            for k in present:
                label = shorten(evaluation.classes[k], NAME_CHARS)
                axes.plot(recalls, 100 * precision[0, :, k], alpha=0.5, linewidth=1, label=label)
        for index, iou in ((0, "0.5"), (5, "0.75"), (slice(None), "0.5 to 0.95")):
            curve = precision[index][..., present].reshape(-1, len(recalls), len(present)).mean((0, 2))
            axes.plot(recalls, 100 * curve, linewidth=2.5, label=f"all, IoU {iou}: {100 * curve.mean():.1f} %")
        axes.set(xlabel="recall", ylabel="precision (%)", title=f"{kind}: by category at IoU 0.5, and the mean of all")
        axes.set(xlim=(0, 1), ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, out)


def plot_found(evaluation: DetectionEvaluation, samples: DetectionSamples, out: Path, num_images: int = 12) -> None:
    """Draw a sheet of images spread evenly over the samples: each with its labelled objects, then as predicted."""
    chosen = torch.linspace(0, len(samples) - 1, min(num_images, len(samples))).round().int().tolist()
    found: dict[int, list[Result]] = {samples[index].image_id: [] for index in chosen}
    for result in evaluation.results:
        if result["image_id"] in found and result["score"] >= SCORE_THRESHOLD:
            found[result["image_id"]].append(result)
    tiles = []
    for sample in map(samples.__getitem__, chosen):
        image, target = read_image(sample, samples.file.path), learnt_target(sample)
        labelled = {**target, "scores": torch.ones(len(target["labels"]))}
        if "masks" in target:
            labelled["masks"] = target["masks"][:, None]
        to_find = read_output(labelled, evaluation.classes, evaluation.category_ids)
        for what, objects in (("to find", to_find), ("found", _as_detections(found[sample.image_id], evaluation))):
            picture = draw_detections(image, objects, evaluation.classes)
            tiles.append(Tile(thumbnail(picture, SIDE), [f"{what}: {len(objects)}", sample.image.name]))
    title = f"{len(chosen)} of {len(samples)} images: what is to be found, and what was (score from {SCORE_THRESHOLD})"
    contact_sheet(tiles, title, side=SIDE, max_columns=4).save(out)


def _as_detections(results: list[Result], evaluation: DetectionEvaluation) -> Detections:
    """The ``results`` of an image in COCO's submission format, as `Detections`."""
    masks = None
    if results and "segmentation" in results[0]:
        from pycocotools import mask

        pixels = mask.decode([result["segmentation"] for result in results])
        masks = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).bool()
    ids = tuple(result["category_id"] for result in results)
    labels = tuple(evaluation.classes[evaluation.category_ids.index(number)] for number in ids)
    boxes = [[left, top, left + width, top + height] for left, top, width, height in (r["bbox"] for r in results)]
    return Detections(labels, ids, tuple(r["score"] for r in results), torch.tensor(boxes).reshape(-1, 4), masks)
