"""What ``qtvit eval`` and ``predict`` do with a segmenter."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import make_parent, run_name, write_json

if TYPE_CHECKING:
    from qtvit.deploy.annotate import FolderWriter, SheetWriter
    from qtvit.deploy.segment import SegmentPredictor, Views


def add_eval_segments(parser: argparse.ArgumentParser) -> None:
    """Options of ``qtvit eval`` for segmenters."""
    group = add_views(parser)
    group.add_argument("--classes", metavar="FILE", help="file of class names and colours, as for training")
    group.add_argument("--save-masks", type=Path, metavar="FOLDER", help="write the predicted masks as index PNGs")


def add_views(parser: argparse.ArgumentParser) -> Any:
    """Options of how a segmenter looks at images; the group they are in."""
    group = parser.add_argument_group("of models for segmentation")
    group.add_argument(
        "--window",
        action=argparse.BooleanOptionalAction,
        help="see images in sliding windows of the size of training crops, or whole (default: large ones in windows)",
    )
    group.add_argument("--flip", action="store_true", help="average with the mirrored image")
    group.add_argument("--scales", metavar="LIST", help="average over several sizes, relative to the usual: 0.5,1,1.5")
    group.add_argument(
        "--img-size", type=int, metavar="PX", help="shorter side to see images at; 0 for their own (the model's)"
    )
    return group


def check_no_views(args: argparse.Namespace) -> None:
    """ValueError if an option was given that only segmenters have."""
    for name in ("window", "flip", "scales", "img_size", "classes", "save_masks"):
        if getattr(args, name, None) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} is for models for segmentation, and {args.run} is none")


def parse_views(args: argparse.Namespace) -> "Views":
    """The options of `add_views`."""
    from qtvit.deploy.segment import Views

    try:
        scales = tuple(float(part) for part in (args.scales or "1").split(","))
    except ValueError:
        raise ValueError(f"--scales must be numbers such as 0.5,1,1.5, got {args.scales}") from None
    return Views(args.window, args.flip, scales, args.img_size)


def evaluate_segmenter(args: argparse.Namespace, predictor: "SegmentPredictor") -> None:
    """``qtvit eval`` of a segmenter."""
    from qtvit import console
    from qtvit.data import load_segmentation_data
    from qtvit.files import open_folder
    from qtvit.training.run import clean_up, create_run_folder
    from qtvit.training.segment_evaluate import evaluate
    from qtvit.training.segment_report import all_scores, class_table, headline, write_report

    views = parse_views(args)
    make_parent(args.json)
    if args.save_masks is not None and args.save_masks.exists() and any(args.save_masks.iterdir()):
        raise ValueError(f"--save-masks {args.save_masks} exists already and is not empty; name another folder")
    data = load_segmentation_data(args.data, classes=args.classes, ignore_index=predictor.mask_classes.ignore_index)
    folder = create_run_folder(args.output, f"eval-{run_name(args.run)}-{data.name}")
    with clean_up(folder):
        if args.save_masks is not None:
            open_folder(args.save_masks)
        evaluation = evaluate(predictor, data.val, data.mask_classes, views, args.save_masks)
    print(f"{headline(evaluation.scores)}: val of {args.data}")
    for line in class_table(evaluation.scores):
        console.result(line)
    about = {
        "run": args.run,
        "data": args.data,
        "window": args.window,
        "flip": views.flip,
        "scales": list(views.scales),
        "img_size": views.img_size,
    }
    write_report(evaluation, folder, about)
    print(f"report: {folder}")
    if args.save_masks is not None:
        print(f"masks: {args.save_masks}")
    if args.json:
        write_json(args.json, all_scores(evaluation.scores, about))


def predict_segments(
    args: argparse.Namespace,
    predictor: "SegmentPredictor",
    files: Mapping[Path, Path],
    writer: "FolderWriter | SheetWriter | None",
) -> None:
    """``qtvit predict`` with a segmenter, for ``files``, each with its path in its folder."""
    from qtvit import console
    from qtvit.data import open_image
    from qtvit.deploy.annotate import FolderWriter, shorten
    from qtvit.deploy.draw_segments import draw_segmentation
    from qtvit.errors import some

    views = parse_views(args)
    width = min(max(len(str(file)) for file in files), 120)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    found = predictor.iter_predict(list(files), views, skip_broken=args.on_bad_image == "skip")
    for file, segmentation in console.progress(
        zip(files, found, strict=True), total=len(files), desc="Predicting", unit="image"
    ):
        name = os.fsencode(file).decode(errors="replace")  # file names may be in another encoding
        if segmentation is None:
            skipped.append(name)
            continue
        shares = segmentation.shares()
        texts = [f"{shorten(label, 30)} {share:.1%}" for label, share in [*shares.items()][: args.top_k]]
        console.result(f"{name:<{width}}  {'   '.join(texts)}")
        height, image_width = segmentation.labels.shape
        classes = [{"label": label, "share": share} for label, share in shares.items()]
        rows.append({"image": name, "width": image_width, "height": height, "classes": classes})
        if writer:
            writer.add(draw_segmentation(open_image(file), segmentation), files[file], [])
            if isinstance(writer, FolderWriter):
                picture = writer.written[-1]
                segmentation.index_image().save(picture.with_name(f"{picture.stem}_mask.png"))
    if not rows:
        raise ValueError(f"none of the {len(skipped)} images can be read: {some(skipped)}")
    if skipped:
        console.say(f"skipped {len(skipped)} of {len(files)} images that cannot be read: {some(skipped)}")
    if args.json:
        write_json(args.json, rows)
    if writer:
        writer.close()
        print(f"written: {some(writer.written)}")
