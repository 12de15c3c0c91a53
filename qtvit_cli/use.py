"""Use trained models: ``qtvit eval``, ``predict`` and ``explain``; what differs by task comes from `qtvit.tasks`."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    RUN,
    SHEET_SUFFIXES,
    Commands,
    add_task_options,
    make_parent,
    new_file,
    pictures,
    positive,
    run_name,
    take_task_options,
    write_json,
)

if TYPE_CHECKING:
    from qtvit.explain import View


def add_use(commands: Commands) -> None:
    """Add the commands that use a trained model."""
    evaluation: Any = commands.add_parser("eval", help="score a trained model on labelled images")
    add = evaluation.add_argument
    add("run", help=f"{RUN}, or an exported file")
    add(
        "--data",
        required=True,
        help="folder of CLASS/*.jpg, folder with val/CLASS/*.jpg, or digits; for a detector, folder in COCO's layout; "
        "for a segmenter, folder of images and masks",
    )
    add("--threads", type=positive, help="CPU threads of the network (default: the cores that loading leaves)")
    add("--num-workers", type=int, help="processes that load images (default: one per core less one)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", help="folder to create for the report (default: runs/eval-RUN-DATA, numbered when taken)")
    add("--json", type=new_file, metavar="FILE", help="also write all scores to FILE")
    evaluation.complete = partial(add_task_options, evaluation, "eval_options")
    evaluation.set_defaults(command=evaluate)

    prediction: Any = commands.add_parser(
        "predict", help="label images, their objects or their pixels with a trained model"
    )
    add = prediction.add_argument
    add("run", help=f"{RUN}, or an exported file")
    add("images", nargs="+", help="image files, or folders of them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=positive, help="CPU threads of the network (default: one per core)")
    add("--json", type=new_file, metavar="FILE", help="also write the predictions to FILE")
    add(
        "--save",
        type=pictures,
        metavar="PATH",
        help="also draw them: sheets of small pictures if PATH ends in .png or .jpg, else a folder of large ones",
    )
    add("--on-bad-image", choices=("stop", "skip"), default="stop", help="what to do about unreadable files (stop)")
    prediction.complete = partial(add_task_options, prediction, "predict_options")
    prediction.set_defaults(command=predict)

    explanation = commands.add_parser("explain", help="draw what the attention of a model looks at in an image")
    add = explanation.add_argument
    add("run", help=RUN)
    add("image", help="image file")
    add(
        "--at",
        action="append",
        default=[],
        metavar="X,Y",
        help="point that attends, in pixels from the upper left one, 0,0; may be repeated (default: the centre)",
    )
    add("--grid", metavar="RxC", help="points all over the image, in R rows and C columns")
    add("--layer", default="-1", help="attention layer: 0 the first, -1 the last, or a name as stages.2.1.attn (-1)")
    add("--head", default="mean", help="number of a head, mean, or all, side by side (mean)")
    add("--compare", nargs="+", default=[], metavar="RUN", help="runs to draw beside it, as of other kernels")
    add("--img-size", metavar="SIZE", help="shorter side to show it at, or HEIGHTxWIDTH")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--output",
        type=new_file,
        metavar="NAME",
        help="what the files' names begin with (default: the image's, in this folder): NAME-attention.png and .npy, "
        "NAME-focus.png",
    )
    explanation.set_defaults(command=explain)


def evaluate(args: argparse.Namespace) -> None:
    """``qtvit eval``."""
    from qtvit import console, tasks
    from qtvit.data import DIGITS
    from qtvit.deploy import Predictor
    from qtvit.training.run import clean_up, create_run_folder, default_workers, set_threads

    make_parent(args.json)
    args.num_workers = default_workers(args.data == DIGITS) if args.num_workers is None else args.num_workers
    set_threads(args.threads, args.num_workers)
    predictor: Any = Predictor.load(args.run, args.device)
    commands = tasks.get(predictor.task).load("commands")()
    take_task_options(args, "eval_options", predictor.task, args.run)
    score = commands.evaluate(args, predictor)
    folder = create_run_folder(args.output, f"eval-{run_name(args.run)}-{Path(args.data).resolve().name}")
    with clean_up(folder):
        report = score()
    print(report.headline)
    for line in report.remarks:
        console.say(line)
    for line in report.lines:
        console.result(line)
    report.write(folder)
    print(f"report: {folder}")
    for line in report.written:
        print(line)
    if args.json:
        write_json(args.json, report.scores)


def predict(args: argparse.Namespace) -> None:
    """``qtvit predict``."""
    from qtvit import console, tasks
    from qtvit.data import open_image
    from qtvit.deploy import Predictor
    from qtvit.deploy.annotate import FolderWriter, SheetWriter
    from qtvit.errors import some

    predictor: Any = Predictor.load(args.run, args.device, args.threads)
    task = tasks.get(predictor.task).load("commands")()
    take_task_options(args, "predict_options", predictor.task, args.run)
    files = _find_files(args.images)
    writer: FolderWriter | SheetWriter | None = None
    if args.save:
        save = args.save.resolve()
        if any(save in (file.resolve(), *file.resolve().parents) for file in files):
            raise ValueError(f"--save {args.save} holds images to predict; name another one")
        is_sheet = save.suffix.lower() in SHEET_SUFFIXES
        writer = SheetWriter(args.save, task.sheet_side) if is_sheet else FolderWriter(args.save)
        make_parent(args.save if is_sheet else args.save / "image")
    make_parent(args.json)
    make_parent(args.csv)
    width = min(max(len(str(file)) for file in files), 120)
    found = task.iter_predict(args, predictor, list(files))
    predictions = zip(files, found, strict=True)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    masks: list[Path] = []
    for file, prediction in console.progress(predictions, total=len(files), desc="Predicting", unit="image"):
        name = os.fsencode(file).decode(errors="replace")  # file names may be in another encoding
        if prediction is None:
            skipped.append(name)
            continue
        console.result(f"{name:<{width}}  {task.line(prediction, predictor)}".rstrip())
        rows.append({"image": name, **task.row(prediction)})
        if writer:
            picture, captions = task.picture(open_image(file), prediction, predictor)
            writer.add(picture, files[file], captions)
            if isinstance(writer, FolderWriter) and (mask := task.mask(prediction)) is not None:
                written = writer.written[-1]
                masks.append(written.with_name(f"{written.stem}_mask.png"))
                mask.save(masks[-1])
    if not rows:
        raise ValueError(f"none of the {len(skipped)} images can be read: {some(skipped)}")
    if skipped:
        console.say(f"skipped {len(skipped)} of {len(files)} images that cannot be read: {some(skipped)}")
    if args.json:
        write_json(args.json, rows)
    if args.csv:
        task.write_csv(args.csv, rows)
    if writer:
        writer.close()
        print(f"written: {some(writer.written)}")
    if masks:
        print(f"masks: {some(masks)}")


def _find_files(names: Sequence[str]) -> dict[Path, Path]:
    """The images that ``names`` of files or folders stand for, each with its path relative to its folder."""
    from qtvit.data import find_images

    files: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = find_images(path)
            if not found:
                raise ValueError(f"{name}: no images in this folder")
        elif path.is_file():
            found = [path]
        else:
            raise FileNotFoundError(f"{name}: no such image file or folder")
        for file in found:
            files.setdefault(file, file.relative_to(path if path.is_dir() else path.parent))
    return files


def explain(args: argparse.Namespace) -> None:
    """``qtvit explain``."""
    from qtvit import console
    from qtvit.data import open_image
    from qtvit.data.preprocess import parse_size
    from qtvit.explain.draw import check_maps, draw_attention, draw_focus
    from qtvit.explain.points import check_points, grid_points, parse_grid, parse_point
    from qtvit.explain.view import look

    points = [parse_point(text) for text in args.at]
    grid = parse_grid(args.grid) if args.grid else (1, 1)
    head = int(args.head) if args.head.isdecimal() else args.head
    layer = int(args.layer) if args.layer.removeprefix("-").isdecimal() else args.layer
    size = parse_size(args.img_size) if args.img_size else None
    img_size = size[0] if size and "x" not in args.img_size else size
    image = open_image(args.image)
    name = args.output or Path(Path(args.image).stem)
    name = name.with_suffix("") if args.output and name.suffix.lower() == ".png" else name
    pictures = [name.with_name(f"{name.name}-{what}.png") for what in ("attention", "focus")]
    raw = [
        pictures[0].with_name(f"{name.name}-attention{f'-{i}' * (i > 1)}.npy") for i in range(1, len(args.compare) + 2)
    ]
    if Path(args.image).resolve() in [path.resolve() for path in [*pictures, *raw]]:
        raise ValueError(f"--output {name} would overwrite {args.image}; name another one")
    if args.grid or not points:
        check_maps(len(points) + grid[0] * grid[1], [1], "mean")  # before a huge number of points is made
        points += grid_points(*grid, image.size)
    check_points(points, image.size)
    make_parent(pictures[0])

    views: dict[str, View] = {}
    for run in (args.run, *args.compare):
        names = [run_name(run), *(f"{run_name(run)} ({number})" for number in range(2, len(args.compare) + 2))]
        views[next(each for each in names if each not in views)] = look(run, image, img_size, args.device)
    check_maps(len(points), [view.num_heads(layer) for view in views.values()], head)
    rows = {run: view.attention(points, layer) for run, view in views.items()}
    draw_attention(rows, pictures[0], head, grid[1] if len(points) == grid[0] * grid[1] else None)
    focus = {run: view.focus() for run, view in views.items()}
    draw_focus(focus, pictures[1])
    width = max(map(len, ["run", *focus]))
    console.result(f"{'run':<{width}}  {'kernel':<18}  {'layer':<16}  {'tokens':>9}  entropy  support")
    for run, layers in focus.items():
        for at in layers:
            tokens = f"{at.map_size[1]} x {at.map_size[0]}"
            console.result(
                f"{run:<{width}}  {at.kernel:<18}  {at.layer:<16}  {tokens:>9}  {at.entropy:>7.3f}  {at.support:>7.1%}"
            )
    print(f"written: {pictures[0]}")
    for path, attention in zip(raw, rows.values(), strict=True):
        attention.save(path)
        shape = " x ".join(map(str, attention.weights.shape))
        print(f"written: {path} (float32, points x heads x height x width: {shape})")
    print(f"written: {pictures[1]}")
