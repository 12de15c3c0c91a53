"""The evaluation of a detector and its report: scores and pictures in a folder, and a table for the terminal."""

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from qtvit.console import progress, shorten
from qtvit.deploy.annotate import Tile, contact_sheet, thumbnail
from qtvit.files import write_text
from qtvit.training.plots import save
from qtvit.training.tables import MAX_ROWS, NAME_CHARS, NUM_WORST

from .coco_eval import FIGURES, CocoScores, GroundTruth
from .data import DetectionDataset, DetectionSample, DetectionSamples, collate, learnt_target, read_image
from .draw import draw_detections
from .predict import SCORE_THRESHOLD, Detections, DetectPredictor, Result, coco_results

SIDE = 320
"""Pixels of a picture on the sheet of predictions."""
MAX_LINES = 12
"""Categories up to which each has its own precision-recall curve."""
RESULTS = "results-{}.json"
"""In COCO's submission format, for bbox and segm."""


@dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector found in labelled images.

    Attributes:
        classes: names, in the order of the labels.
        category_ids: of the classes.
        results: all that it found, in COCO's submission format.
        scores: COCO's figures of boxes and masks, by "box" and "mask".
        num_images: that were looked at.
        images_per_second: speed of the detector alone, one image at a time.
    """

    classes: Sequence[str]
    category_ids: Sequence[int]
    results: list[Result]
    scores: dict[str, CocoScores]
    num_images: int
    images_per_second: float

    def metrics(self) -> dict[str, float | None]:
        """All figures: box_ap, box_ap50, …, mask_ap, …."""
        return {
            f"{kind}_{name}": value for kind, of_kind in self.scores.items() for name, value in of_kind.figures.items()
        }


@torch.inference_mode()
def evaluate_detector(
    predictor: DetectPredictor, samples: DetectionSamples, truth: GroundTruth, *, num_workers: int = 0
) -> DetectionEvaluation:
    """Run ``predictor`` over all ``samples`` and hold what it finds against ``truth``."""
    loader: Any = DataLoader(DetectionDataset(samples), batch_size=1, collate_fn=collate, num_workers=num_workers)
    results: list[Result] = []
    seconds = 0.0
    for [image], [target] in progress(loader, desc="Evaluating", unit="image"):
        start = time.perf_counter()
        output = {name: tensor.cpu() for name, tensor in predictor.runtime.detect(image).items()}
        seconds += time.perf_counter() - start
        results += coco_results(output, target["image_id"], predictor.category_ids)
    return DetectionEvaluation(
        predictor.classes,
        predictor.category_ids,
        results,
        truth.score(results, predictor.has_masks),
        len(samples),
        len(samples) / seconds,
    )


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
        samples: the images that it is of.
        folder: to write into.
        about: what else to say in scores.json.
        with_results: write results-bbox.json and results-segm.json too. They are two files, since pycocotools takes the
            sizes of masks from their boxes if these are there.
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
        for kind, key in {"bbox": "bbox", "segm": "segmentation"}.items():
            if all(key in result for result in evaluation.results):
                names = ("image_id", "category_id", "score", key)
                content = [{name: result[name] for name in names} for result in evaluation.results]
                write_text(folder / RESULTS.format(kind), json.dumps(content) + "\n")


def scores(evaluation: DetectionEvaluation, about: Mapping[str, object] | None = None) -> dict[str, object]:
    """All numbers of an evaluation, for JSON."""
    return {
        **(about or {}),
        **evaluation.metrics(),
        "num_images": evaluation.num_images,
        "per_category": _rows(evaluation),
    }


def _rows(evaluation: DetectionEvaluation) -> list[dict[str, Any]]:
    """One of each category, with the scores of boxes and masks."""
    same = ("category_id", "label", "num_objects")
    rows: list[dict[str, Any]] = [
        {name: getattr(category, name) for name in same} for category in evaluation.scores["box"].per_category
    ]
    for kind, of_kind in evaluation.scores.items():
        for row, category in zip(rows, of_kind.per_category, strict=True):
            row |= {f"{kind}_{name}": value for name, value in asdict(category).items() if name not in same}
    return rows


def figure_table(evaluation: DetectionEvaluation) -> list[str]:
    """Lines of a table of COCO's twelve figures of boxes and of masks, in percent."""
    kinds = list(evaluation.scores)
    lines = [f"{'':<12}" + "".join(f"{kind + ' %':>9}" for kind in kinds)]
    for name in FIGURES:
        values = [evaluation.scores[kind].figures[name] for kind in kinds]
        what, _, rest = name.partition("_")
        text = what.upper() + (f" {rest}" if rest else "")
        lines.append(f"{text:<12}" + "".join(f"{_show(value):>9}" for value in values))
    return lines


def category_table(evaluation: DetectionEvaluation) -> list[str]:
    """Lines of a table of the categories; of many, of those with the lowest box AP."""
    rows = _rows(evaluation)
    known = [row for row in rows if row["box_ap"] is not None]
    shown = rows if len(rows) <= MAX_ROWS else sorted(known, key=lambda row: row["box_ap"])[:NUM_WORST]
    columns = [f"{kind}_{name}" for kind in evaluation.scores for name in ("ap", "ap50")]
    width = min(max(len("category"), *(len(row["label"]) for row in shown)), NAME_CHARS)
    heads = [f"{name.split('_')[0]} {name.split('_')[1].upper()} %" for name in columns]
    lines = [f"{'category':<{width}}{'id':>8}{'objects':>9}" + "".join(f"{head:>13}" for head in heads)]
    for row in shown:
        cells = "".join(f"{_show(row[name]):>13}" for name in columns)
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
    """Precision over recall, of boxes and of masks: means over the categories at several IoUs, and at 0.5 those of the
    categories.
    """
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
    """A sheet of images from all over the samples: what is to be found, and beside it what was found."""
    chosen = torch.linspace(0, len(samples) - 1, min(num_images, len(samples))).round().int().tolist()
    found: dict[int, list[Result]] = {samples[index].image_id: [] for index in chosen}
    for result in evaluation.results:
        if result["image_id"] in found and result["score"] >= SCORE_THRESHOLD:
            found[result["image_id"]].append(result)
    label_of = dict(zip(evaluation.category_ids, evaluation.classes, strict=True))
    tiles = []
    for index in chosen:
        sample = samples[index]
        image = read_image(sample, samples.file.path)
        pair = (_labelled(sample, evaluation), _as_detections(found[sample.image_id], label_of))
        for what, objects in zip(("to find", "found"), pair, strict=True):
            picture = draw_detections(image, objects, evaluation.classes)
            tiles.append(Tile(thumbnail(picture, SIDE), [f"{what}: {len(objects)}", sample.image.name]))
    title = f"{len(chosen)} of {len(samples)} images: what is to be found, and what was (score from {SCORE_THRESHOLD})"
    contact_sheet(tiles, title, side=SIDE, max_columns=4).save(out)


def _labelled(sample: DetectionSample, evaluation: DetectionEvaluation) -> Detections:
    """The objects that were to be learnt in an image."""
    target = learnt_target(sample)
    labels = [label - 1 for label in target["labels"].tolist()]
    return Detections(
        tuple(evaluation.classes[label] for label in labels),
        tuple(evaluation.category_ids[label] for label in labels),
        (1.0,) * len(labels),
        torch.Tensor(target["boxes"]),
        target["masks"].bool() if "masks" in target else None,
    )


def _as_detections(results: list[Result], label_of: Mapping[int, str]) -> Detections:
    """The objects of an image that ``results`` tell of."""
    masks = None
    if results and "segmentation" in results[0]:
        from pycocotools import mask

        pixels = mask.decode([result["segmentation"] for result in results])
        masks = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).bool()
    boxes = [[left, top, left + width, top + height] for left, top, width, height in (r["bbox"] for r in results)]
    return Detections(
        tuple(label_of[result["category_id"]] for result in results),
        tuple(result["category_id"] for result in results),
        tuple(result["score"] for result in results),
        torch.tensor(boxes).reshape(-1, 4),
        masks,
    )
