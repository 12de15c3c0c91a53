"""What the command line asks and prints for detectors."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..commands import EvalReport, Option, Quickstart, TaskCommands


def score_from_0_to_1(text: str) -> float:
    """Parse an option's number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return number


class DetectCommands(TaskCommands):
    """The part of the commands that is about objects in images."""

    noun = "detector"
    sheet_side = 320
    eval_options = (
        Option("--val-annotations", "annotation file, if it is elsewhere", None, {"metavar": "FILE"}),
        Option("--val-images-dir", "folder that its file names are in", None, {"metavar": "DIR"}),
    )
    predict_options = (
        Option(
            "--score-threshold",
            "leave out what is less certain, 0 to 1 (default: 0.5)",
            0.5,
            {"type": score_from_0_to_1, "metavar": "SCORE"},
        ),
        Option("--classes", "look for these alone", None, {"metavar": "A,B,…"}),
    )
    check_options = tuple(
        option
        for split in ("train", "val")
        for option in (
            Option(f"--{split}-annotations", f"annotation file of {split}", None, {"metavar": "FILE"}),
            Option(f"--{split}-images-dir", "folder that its file names are in", None, {"metavar": "DIR"}),
        )
    )
    quickstart = Quickstart(
        "quickstart/detect",
        """
Next, with your own images and boxes in COCO's layout (photos/annotations/instances_train.json, photos/train/1.jpg, …):

    {command} train detect --model qtvit_1 --data photos --checkpoint CLASSIFIER
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg --save found

and with the model just trained:

    {command} eval {run} --data {data}
    {command} predict {run} {data}/val --save found.png""",
        scenes="runs/digit-scenes-detect",
        num_train=800,
        num_val=100,
    )

    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        from .coco_eval import GroundTruth
        from .data import load_held_out
        from .evaluate import evaluate_detector
        from .report import category_table, figure_table, headline, scores, write_detection_report

        categories = dict(zip(predictor.category_ids, predictor.info.classes, strict=True))
        given = {"annotations": args.val_annotations, "images_dir": args.val_images_dir}
        samples = load_held_out(args.data, categories, **given, use_masks=predictor.has_masks)
        truth = GroundTruth(samples, categories)

        def run() -> EvalReport:
            evaluation = evaluate_detector(predictor, samples, truth, num_workers=args.num_workers)
            about = {"run": args.run, "data": args.data, "annotations": str(samples.file.path)}
            return EvalReport(
                f"{headline(evaluation)}: {samples.file.path}",
                [*figure_table(evaluation), "", *category_table(evaluation)],
                scores(evaluation, about),
                lambda folder: write_detection_report(evaluation, samples, folder, about, with_results=True),
            )

        return run

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        classes = [name.strip() for name in args.classes.split(",")] if args.classes else None
        skip = args.on_bad_image == "skip"
        return predictor.iter_predict(files, args.score_threshold, classes, skip_broken=skip)

    def line(self, prediction: Any, predictor: Any) -> str:
        return str(prediction) or "nothing found"

    def row(self, prediction: Any) -> dict[str, Any]:
        objects = zip(prediction.labels, prediction.to_coco(0), strict=True)
        row = [{"label": label, **result} for label, result in objects]
        for entry in row:
            del entry["image_id"]
        return {"objects": row}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        from .draw import draw_detections

        return draw_detections(image, prediction, predictor.classes), []
