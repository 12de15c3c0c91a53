"""What the command line asks and prints for segmenters."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..commands import EvalReport, Option, Quickstart, TaskCommands

VIEWS = (
    Option(
        "--window",
        "see images in sliding windows of the size of training crops, or whole (large ones in windows)",
        None,
        {"action": argparse.BooleanOptionalAction},
    ),
    Option("--flip", "average with the mirrored image", False, {"action": "store_true"}),
    Option("--scales", "average over several sizes, relative to the usual: 0.5,1,1.5", "1", {"metavar": "LIST"}),
    Option("--img-size", "shorter side to see images at; 0 for their own", None, {"type": int, "metavar": "PX"}),
)
"""The options for how images are presented to a segmenter."""
NUM_SHOWN = 5
"""Number of an image's classes that are printed."""


class SegmentCommands(TaskCommands):
    """The part of the commands that is about classes of pixels."""

    noun = "segmenter"
    sheet_side = 320
    eval_options = (
        Option("--mask-classes", "file of class names and colours", None, {"metavar": "FILE"}),
        Option("--save-masks", "write what it predicts as index masks, PNGs", None, {"type": Path, "metavar": "DIR"}),
        *VIEWS,
    )
    predict_options = VIEWS
    check_options = (
        Option("--classes", "file of class names and colours, as for training", None, {"metavar": "FILE"}),
        Option("--ignore-index", "as for training (default: 255)", 255, {"type": int, "metavar": "N"}),
    )
    quickstart = Quickstart(
        "quickstart/segment",
        """
Next, with your own images and masks (photos/train/images/1.jpg, photos/train/masks/1.png, and photos/val the same):

    {command} data check photos --task segment
    {command} train segment --model qtvit_1 --data photos --checkpoint CLASSIFIER
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg --save found

and with the model just trained:

    {command} eval {run} --data {data}
    {command} predict {run} {data}/val/images --save found.png""",
        scenes="runs/digit-scenes-segment",
        num_train=3200,
        num_val=100,
    )

    def evaluate(self, args: argparse.Namespace, predictor: Any) -> Callable[[], EvalReport]:
        from qtvit.files import open_folder

        from .data import load_segmentation_data
        from .evaluate import evaluate
        from .report import all_scores, class_table, headline, write_report

        views, masks = _views(args), args.save_masks
        if masks is not None and masks.exists() and (not masks.is_dir() or any(masks.iterdir())):
            raise ValueError(f"--save-masks {masks} exists already and is not empty; name another folder")
        ignored = predictor.mask_classes.ignore_index
        data = load_segmentation_data(args.data, classes=args.mask_classes, ignore_index=ignored)

        def run() -> EvalReport:
            if masks is not None:
                open_folder(masks)
            evaluation = evaluate(predictor, data.val, data.mask_classes, views, masks)
            about = {"run": args.run, "data": args.data, **{each.name: getattr(args, each.name) for each in VIEWS}}
            return EvalReport(
                f"{headline(evaluation.scores)}: those of val in {args.data}",
                class_table(evaluation.scores),
                all_scores(evaluation.scores, about),
                lambda folder: write_report(evaluation, folder, about),
                written=[] if masks is None else [f"masks: {masks}"],
            )

        return run

    def iter_predict(self, args: argparse.Namespace, predictor: Any, files: Sequence[Path]) -> Iterator[Any]:
        return predictor.iter_predict(files, _views(args), skip_broken=args.on_bad_image == "skip")

    def line(self, prediction: Any, predictor: Any) -> str:
        from qtvit.console import shorten

        shares = [f"{shorten(label, 30)} {share:.1%}" for label, share in prediction.shares().items()]
        return "   ".join(shares[:NUM_SHOWN]) + (f"   and {len(shares) - NUM_SHOWN} more" if shares[NUM_SHOWN:] else "")

    def row(self, prediction: Any) -> dict[str, Any]:
        height, width = prediction.labels.shape
        classes = [{"label": label, "share": share} for label, share in prediction.shares().items()]
        return {"width": width, "height": height, "classes": classes}

    def picture(self, image: Any, prediction: Any, predictor: Any) -> tuple[Any, Sequence[str]]:
        from .draw import draw_segmentation

        return draw_segmentation(image, prediction), []

    def mask(self, prediction: Any) -> Any:
        return prediction.index_image()


def _views(args: argparse.Namespace) -> Any:
    """The options `VIEWS` as the predictor takes them."""
    from .predict import Views

    try:
        scales = tuple(float(part) for part in args.scales.split(","))
    except ValueError:
        raise ValueError(f"--scales must be numbers such as 0.5,1,1.5, got {args.scales}") from None
    return Views(args.window, args.flip, scales, args.img_size)
