"""What ``qtvit eval`` and ``predict`` do for each task."""

import argparse
import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .common import write_json


class TaskCommands(ABC):
    """The part of the commands that differs by task."""

    eval_options: ClassVar[Mapping[str, Any]]
    """Options of ``qtvit eval`` that are for this task and not for all, with their defaults."""
    predict_options: ClassVar[Mapping[str, Any]]
    """Likewise of ``qtvit predict``."""
    sheet_side: ClassVar[int] = 176
    """Pixels of a picture on a sheet."""

    @abstractmethod
    def evaluate(self, args: argparse.Namespace, predictor: Any, name: str) -> None:
        """Score ``predictor``, print the scores and write the report, by default to runs/NAME."""

    @abstractmethod
    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        """What the model makes of each file; None for one that is skipped."""

    @abstractmethod
    def line(self, prediction: Any, predictor: Any) -> str:
        """What to print of an image."""

    @abstractmethod
    def row(self, prediction: Any) -> dict[str, Any]:
        """What to write of an image into a JSON file."""

    @abstractmethod
    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        """The image as it is to be saved, and captions for it."""

    def mask(self, prediction: Any) -> Any:
        """A picture of labels, to be saved as PNG beside a large picture; None for tasks without such."""
        return None

    def write_csv(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write what `row` gave as a table; for tasks with an option ``csv``."""
        raise NotImplementedError


class Classify(TaskCommands):
    """Labels of images."""

    eval_options: ClassVar = {"batch_size": 64, "on_bad_image": "stop"}
    predict_options: ClassVar = {"top_k": 5, "batch_size": 32, "csv": None}

    def evaluate(self, args: argparse.Namespace, predictor: Any, name: str) -> None:
        from qtvit import console
        from qtvit.data import drop_broken
        from qtvit.deploy.held_out import held_out_samples
        from qtvit.errors import some
        from qtvit.training.evaluate import evaluate
        from qtvit.training.report import class_table, headline, scores, write_report
        from qtvit.training.run import clean_up, create_run_folder

        samples, which = held_out_samples(args.data, predictor.info)
        folder = create_run_folder(args.output, name)
        with clean_up(folder):
            if args.on_bad_image == "skip":
                samples = drop_broken(samples)
            evaluation = evaluate(predictor, samples, batch_size=args.batch_size, num_workers=args.num_workers)
        print(f"{headline(evaluation)}: {which}")
        absent = [row.label for row in evaluation.per_class() if row.num_images == 0]
        if absent:
            console.say(f"no images of {len(absent)} of the {len(predictor.classes)} classes: {some(absent)}")
        for line in class_table(evaluation):
            console.result(line)
        about = {"run": args.run, "data": args.data, "images": which}
        write_report(evaluation, samples, folder, about)
        print(f"report: {folder}")
        if args.json:
            write_json(args.json, scores(evaluation, about))

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        skip = args.on_bad_image == "skip"
        found: Iterator[Any] = predictor.iter_predict(files, args.top_k, args.batch_size, skip_broken=skip)
        return found

    def line(self, prediction: Any, predictor: Any) -> str:
        from qtvit.deploy.annotate import shorten

        width = min(max(map(len, predictor.classes)), 30)
        pairs = list(zip(prediction.labels, prediction.probabilities, strict=True))
        others = "   ".join(f"{shorten(label, width)} {p:.1%}" for label, p in pairs[1:])
        return f"{shorten(prediction.label, width):<{width}}  {prediction.probability:>6.1%}   {others}"

    def row(self, prediction: Any) -> dict[str, Any]:
        pairs = zip(prediction.labels, prediction.probabilities, strict=True)
        return {"predictions": [{"label": label, "probability": p} for label, p in pairs]}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        pairs = zip(prediction.labels, prediction.probabilities, strict=True)
        return image, [f"{p:.0%} {label}" for label, p in pairs]

    def write_csv(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        from qtvit.files import write_text

        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["image", "rank", "label", "probability"])
        for row in rows:
            for rank, prediction in enumerate(row["predictions"], start=1):
                writer.writerow([row["image"], rank, prediction["label"], f"{prediction['probability']:.6f}"])
        write_text(path, table.getvalue())
        print(f"written: {path}")


class Detect(TaskCommands):
    """Objects in images."""

    eval_options: ClassVar = {"val_annotations": None, "val_images_dir": None}
    predict_options: ClassVar = {"score_threshold": 0.5, "classes": None}
    sheet_side = 320

    def evaluate(self, args: argparse.Namespace, predictor: Any, name: str) -> None:
        from qtvit import console
        from qtvit.data import load_held_out
        from qtvit.training.coco_eval import GroundTruth
        from qtvit.training.detect_report import (
            category_table,
            evaluate_detector,
            figure_table,
            headline,
            scores,
            write_detection_report,
        )
        from qtvit.training.run import clean_up, create_run_folder

        categories = dict(zip(predictor.category_ids, predictor.info.classes, strict=True))
        samples = load_held_out(
            args.data,
            categories,
            annotations=args.val_annotations,
            images_dir=args.val_images_dir,
            use_masks=predictor.has_masks,
        )
        truth = GroundTruth(samples, categories)
        folder = create_run_folder(args.output, name)
        with clean_up(folder):
            evaluation = evaluate_detector(predictor, samples, truth, num_workers=args.num_workers)
        print(f"{headline(evaluation)}: {samples.file.path}")
        for line in (*figure_table(evaluation), "", *category_table(evaluation)):
            console.result(line)
        about = {"run": args.run, "data": args.data, "annotations": str(samples.file.path)}
        write_detection_report(evaluation, samples, folder, about, with_results=True)
        print(f"report: {folder}")
        if args.json:
            write_json(args.json, scores(evaluation, about))

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        classes = [name.strip() for name in args.classes.split(",")] if args.classes else None
        skip = args.on_bad_image == "skip"
        found: Iterator[Any] = predictor.iter_predict(files, args.score_threshold, classes, skip_broken=skip)
        return found

    def line(self, prediction: Any, predictor: Any) -> str:
        return str(prediction) or "nothing found"

    def row(self, prediction: Any) -> dict[str, Any]:
        objects = [{"label": label} for label in prediction.labels]
        for entry, result in zip(objects, prediction.to_coco(0), strict=True):
            del result["image_id"]
            entry |= result
        return {"objects": objects}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        from qtvit.deploy.draw_detections import draw_detections

        return draw_detections(image, prediction, predictor.classes), []


VIEWS: Mapping[str, Any] = {"window": None, "flip": False, "scales": "1", "img_size": None}
"""Options of `add_views`, with their defaults."""


NUM_SHOWN = 5
"""Classes of an image that are printed."""


class Segment(TaskCommands):
    """Classes of pixels."""

    eval_options: ClassVar = {"mask_classes": None, "save_masks": None, **VIEWS}
    predict_options: ClassVar = VIEWS
    sheet_side = 320

    def evaluate(self, args: argparse.Namespace, predictor: Any, name: str) -> None:
        from qtvit import console
        from qtvit.data import load_segmentation_data
        from qtvit.deploy.segment_evaluate import evaluate
        from qtvit.files import open_folder
        from qtvit.training.run import clean_up, create_run_folder
        from qtvit.training.segment_report import all_scores, class_table, headline, write_report

        views, masks = _views(args), args.save_masks
        if masks is not None and masks.exists() and (not masks.is_dir() or any(masks.iterdir())):
            raise ValueError(f"--save-masks {masks} exists already and is not empty; name another folder")
        ignored = predictor.mask_classes.ignore_index
        data = load_segmentation_data(args.data, classes=args.mask_classes, ignore_index=ignored)
        folder = create_run_folder(args.output, name)
        with clean_up(folder):
            if masks is not None:
                open_folder(masks)
            evaluation = evaluate(predictor, data.val, data.mask_classes, views, masks)
        print(f"{headline(evaluation.scores)}: those of val in {args.data}")
        for line in class_table(evaluation.scores):
            console.result(line)
        about = {"run": args.run, "data": args.data, **{option: getattr(args, option) for option in VIEWS}}
        write_report(evaluation, folder, about)
        print(f"report: {folder}")
        if masks is not None:
            print(f"masks: {masks}")
        if args.json:
            write_json(args.json, all_scores(evaluation.scores, about))

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        found: Iterator[Any] = predictor.iter_predict(files, _views(args), skip_broken=args.on_bad_image == "skip")
        return found

    def line(self, prediction: Any, predictor: Any) -> str:
        from qtvit.deploy.annotate import shorten

        shares = [f"{shorten(label, 30)} {share:.1%}" for label, share in prediction.shares().items()]
        return "   ".join(shares[:NUM_SHOWN]) + (f"   and {len(shares) - NUM_SHOWN} more" if shares[NUM_SHOWN:] else "")

    def row(self, prediction: Any) -> dict[str, Any]:
        height, width = prediction.labels.shape
        classes = [{"label": label, "share": share} for label, share in prediction.shares().items()]
        return {"width": width, "height": height, "classes": classes}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        from qtvit.deploy.draw_segments import draw_segmentation

        return draw_segmentation(image, prediction), []

    def mask(self, prediction: Any) -> Any:
        return prediction.index_image()


def add_views(parser: argparse.ArgumentParser) -> None:
    """Options of how a segmenter looks at images."""
    parser.add_argument(
        "--window",
        action=argparse.BooleanOptionalAction,
        help="segmenter: see images in sliding windows of the size of training crops, or whole (large ones in windows)",
    )
    parser.add_argument("--flip", action="store_true", default=None, help="segmenter: average with the mirrored image")
    parser.add_argument(
        "--scales", metavar="LIST", help="segmenter: average over several sizes, relative to the usual: 0.5,1,1.5"
    )
    parser.add_argument(
        "--img-size", type=int, metavar="PX", help="segmenter: shorter side to see images at; 0 for their own"
    )


def _views(args: argparse.Namespace) -> Any:
    """The options of `add_views`, as the predictor takes them."""
    from qtvit.deploy import Views

    try:
        scales = tuple(float(part) for part in args.scales.split(","))
    except ValueError:
        raise ValueError(f"--scales must be numbers such as 0.5,1,1.5, got {args.scales}") from None
    return Views(args.window, args.flip, scales, args.img_size)


TASKS: Mapping[str, TaskCommands] = {"classify": Classify(), "detect": Detect(), "segment": Segment()}


def apply_options(args: argparse.Namespace, task: str, which: str) -> None:
    """Fill the defaults of a task's options in; ValueError for one that is given and for another task."""
    own = getattr(TASKS[task], which)
    for commands in TASKS.values():
        for name in getattr(commands, which):
            if name not in own and getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is not for a model that was trained to {task}, as {args.run}"
                )
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def score_from_0_to_1(text: str) -> float:
    """An option's number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return number
