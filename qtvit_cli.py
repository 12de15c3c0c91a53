"""The ``qtvit`` command.

It stands beside the package, not in it: importing ``qtvit`` registers models with timm, which takes seconds, and
``qtvit --help`` should not. Each command imports what it needs when it runs.
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtvit.deploy import Prediction, Predictor
    from qtvit.explain import View
    from qtvit.training.classify import RunSummary

USER_ERRORS = (ValueError, OSError, FloatingPointError)
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")
RUN = "run folder, model file, hf-hub:USER/MODEL, or nano-cifar10, which comes with qtvit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``; 0 if it worked, 2 with one line on stderr if the user has to change something."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, first = "--debug" in argv, os.environ.get("RANK", "0") == "0"
    quiet = "--quiet" in argv or not first  # of torchrun's processes, one speaks
    args, rest = _parser().parse_known_args([arg for arg in argv if arg not in ("--debug", "--quiet")])
    args.rest = rest
    if rest and args.command not in (train_classify, ablate):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from qtvit import console

        with console.quiet(quiet):
            return args.command(rest if args.command == train_classify else args) or 0
    except KeyboardInterrupt as stop:
        if first:
            print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as after `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("qtvit"):
            raise
        print(f"qtvit: error: {error.name} is not installed; pip install 'qtvit[train]'", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        if debug:
            raise
        if first or isinstance(error, FloatingPointError):
            print(f"qtvit: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """The message of ``error``; of one that a loader process passed on, the message it was raised with."""
    message = str(error) or type(error).__name__
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def _pictures(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() in SHEET_SUFFIXES:
        return _new_file(text)
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is a file; expected a folder, or a file that ends in .png or .jpg")
    return path


class _OptionParser(argparse.ArgumentParser):
    """Takes nothing misspelt for the abbreviation of an option; nor do the parsers of its commands, which are such.

    And takes ``--at -5,80`` for an option with its value, as argparse does ``--at -5``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        joined: list[str] = []
        for arg in sys.argv[1:] if args is None else args:
            if joined and joined[-1].startswith("--") and re.fullmatch(r"-[\d.]+,.*", arg):
                joined[-1] += f"={arg}"
            else:
                joined.append(arg)
        return super().parse_known_args(joined, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _OptionParser(
        prog="qtvit",
        description="QT-ViT: vision backbones with quadratic-Taylor linear attention. See also `qtvit COMMAND --help`.",
        epilog="With any command: --quiet prints results alone, no progress; --debug shows the traceback of an error.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    quick = commands.add_parser("quickstart", help="train the smallest model on built-in digits, in about a minute")
    quick.add_argument("--output", help="run folder to create (default: runs/qtvit_nano-digits, numbered when taken)")
    quick.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    quick.set_defaults(command=quickstart)

    train = commands.add_parser("train", help="train a model on your images")
    tasks = train.add_subparsers(metavar="TASK", required=True)
    classify = tasks.add_parser("classify", help="image classification", add_help=False)
    classify.set_defaults(command=train_classify)

    evaluation = commands.add_parser("eval", help="score a trained model on labelled images")
    evaluation.add_argument("run", help=RUN)
    evaluation.add_argument(
        "--data", required=True, help="folder of CLASS/*.jpg, folder with val/CLASS/*.jpg, or digits"
    )
    evaluation.add_argument("--batch-size", type=_positive, default=64)
    evaluation.add_argument(
        "--num-workers", type=int, help="processes that load images (default: one per core less one)"
    )
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    evaluation.add_argument(
        "--output", help="folder to create for the report (default: runs/eval-RUN-DATA, numbered when taken)"
    )
    evaluation.add_argument("--json", type=_new_file, metavar="FILE", help="also write all scores to FILE")
    evaluation.add_argument(
        "--on-bad-image", choices=("stop", "skip"), default="stop", help="what to do about unreadable files (stop)"
    )
    evaluation.set_defaults(command=evaluate)

    prediction = commands.add_parser("predict", help="label images with a trained model")
    prediction.add_argument("run", help=RUN)
    prediction.add_argument("images", nargs="+", help="image files, or folders of them")
    prediction.add_argument("--top-k", type=_positive, default=5, help="classes to show per image (default: 5)")
    prediction.add_argument("--batch-size", type=_positive, default=32)
    prediction.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    prediction.add_argument("--json", type=_new_file, metavar="FILE", help="also write the predictions to FILE")
    prediction.add_argument("--csv", type=_new_file, metavar="FILE", help="the same as a table: image, rank, label, …")
    prediction.add_argument(
        "--save",
        type=_pictures,
        metavar="PATH",
        help="also draw them: sheets of small pictures if PATH ends in .png or .jpg, else a folder of large ones",
    )
    prediction.add_argument(
        "--on-bad-image", choices=("stop", "skip"), default="stop", help="what to do about unreadable files (stop)"
    )
    prediction.set_defaults(command=predict)

    explanation = commands.add_parser("explain", help="draw what the attention of a model looks at in an image")
    explanation.add_argument("run", help=RUN)
    explanation.add_argument("image", help="image file")
    explanation.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="X,Y",
        help="point that attends, in pixels from the upper left one, 0,0; may be repeated (default: the centre)",
    )
    explanation.add_argument("--grid", metavar="RxC", help="points all over the image, in R rows and C columns")
    explanation.add_argument(
        "--layer", default="-1", help="attention layer: 0 the first, -1 the last, or a name as stages.2.1.attn (-1)"
    )
    explanation.add_argument("--head", default="mean", help="number of a head, mean, or all, side by side (mean)")
    explanation.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="runs to draw beside it, as of other kernels"
    )
    explanation.add_argument("--img-size", metavar="SIZE", help="shorter side to show it at, or HEIGHTxWIDTH")
    explanation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    explanation.add_argument(
        "--output",
        type=_new_file,
        metavar="NAME",
        help="what the files' names begin with (default: the image's, in this folder): NAME-attention.png and .npy, "
        "NAME-focus.png",
    )
    explanation.set_defaults(command=explain)

    publication = commands.add_parser(
        "push",
        help="put a trained model on the Hugging Face Hub, with a model card",
        description="Uploads the model, the description that timm.create_model needs, and a model card. A README.md in "
        "the folder of RUN is the card; without one it is written from what the run says, but does not replace one on "
        "the Hub. `hf auth login`, or HF_TOKEN, says who you are.",
    )
    publication.add_argument("run", help=RUN)
    publication.add_argument("name", metavar="USER/MODEL", help="what to call it on the Hub; made if it is not there")
    publication.add_argument("--private", action="store_true", help="nobody else is to see it")
    publication.add_argument("--folder", metavar="DIR", help="write the files to a new folder, and upload nothing")
    publication.add_argument("--license", metavar="ID", help="of the weights, as the Hub calls it: apache-2.0, mit, …")
    publication.add_argument(
        "--dataset", metavar="ID", help="what it was trained on, if that is on the Hub: uoft-cs/cifar10, …"
    )
    publication.set_defaults(command=push)

    bench = commands.add_parser("bench", help="measure models side by side")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    steps = kinds.add_parser("train", help="time of a training step, and memory kept for its backward pass")
    steps.add_argument("models", nargs="*", default=["qtvit_1"], help="ours or timm's (default: qtvit_1)")
    steps.add_argument("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    steps.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    steps.add_argument("--batch-size", type=_positive, default=16)
    steps.add_argument("--rounds", type=_positive, default=10, help="steps of each model to time (default: 10)")
    steps.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    steps.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    steps.add_argument("--threads", type=_positive, help="CPU threads (default: one per core)")
    steps.add_argument("--json", type=_new_file, metavar="FILE", help="also write all samples to FILE")
    steps.set_defaults(command=bench_train)
    loader = kinds.add_parser("loader", help="images per second of the training loader, next to timm's")
    loader.add_argument("data", help="folder with train/CLASS/*.jpg, or CLASS/*.jpg alone")
    loader.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    loader.add_argument("--batch-size", type=_positive, default=128)
    loader.add_argument("--num-workers", type=int, help="processes that load images (default: one per core less one)")
    loader.add_argument("--batches", type=_positive, default=8, help="batches of a turn (default: 8)")
    loader.add_argument("--rounds", type=_positive, default=10, help="turns of each loader to time (default: 10)")
    loader.add_argument("--auto-augment", default="rand-n1-m3-mstd1.0-inc1", help="default: %(default)s")
    loader.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    loader.add_argument("--json", type=_new_file, metavar="FILE", help="also write all samples to FILE")
    loader.set_defaults(command=bench_loader)

    ablation = commands.add_parser(
        "ablate",
        help="train the rows of a table of the paper at the same budget, with several seeds, and compare them",
        description="Trains every row of a table with every seed, run by run, and compares the rows with the default. "
        "The same command again goes on with what is missing; several processes with the same command share the runs.",
        epilog="The other options are those of `qtvit train classify`, such as --data, --model, --epochs, "
        "--train-images, --recipe; they hold for all rows.",
    )
    ablation.add_argument(
        "table", help="table2 (kernels), table3 (Kronecker products), table7 (softmax residual), ape, or shortcut"
    )
    ablation.add_argument("--seeds", type=_positive, default=3, help="trains with seeds 0 to SEEDS - 1 (default: 3)")
    ablation.add_argument("--rows", metavar="A,B,…", help="some rows of the table; the default row is always trained")
    ablation.add_argument("--output", metavar="FOLDER", help="default: runs/ablate-TABLE-MODEL-DATA")
    ablation.set_defaults(command=ablate)

    conversion = commands.add_parser(
        "convert",
        help="make a model file of weights of others: the authors' release, EfficientViT (MIT's, timm's)",
        description="Finds the model that the weights are of, maps every tensor, and writes a model file that every "
        "command and timm take; whatever it cannot explain is an error.",
    )
    conversion.add_argument("src", help="weights (.pt, .pth, .safetensors), model file, run folder, or nano-cifar10")
    conversion.add_argument(
        "dst", type=_new_file, help="file to write: .safetensors; with --to released .pt or .pth too"
    )
    conversion.add_argument("--model", metavar="NAME", help="the model they have to be of (default: found by shapes)")
    conversion.add_argument(
        "--kernel", metavar="NAME", help="attention kernel of the model to write (taylor2 for EfficientViT's weights)"
    )
    conversion.add_argument(
        "--img-size", nargs=2, type=_positive, metavar=("H", "W"), help="image size to resize positional maps to"
    )
    conversion.add_argument("--ema", action="store_true", help="take the moving average in a training checkpoint")
    conversion.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    conversion.add_argument(
        "--to", choices=("qtvit", "released"), default="qtvit", help="released: names of the authors' code (qtvit)"
    )
    conversion.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    conversion.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    conversion.set_defaults(command=convert)

    data = commands.add_parser("data", help="prepare image folders: pack them into shards, check them")
    what = data.add_subparsers(metavar="WHAT", required=True)
    pack = what.add_parser(
        "pack", help="copy a folder of images into few large tar files, which other commands take as --data too"
    )
    pack.add_argument("folder", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg alone")
    pack.add_argument("out", type=Path, help="folder to create")
    pack.add_argument("--shard-size", type=_positive, default=256, metavar="MB", help="of each tar file (default: 256)")
    pack.set_defaults(command=pack_data)
    check = what.add_parser(
        "check",
        help="read every image, and list what is broken, doubled, mislabelled or too small",
        description="Reads every image of a folder or packed folder. Reports images that cannot be read or are tiny, "
        "the same image in several classes, in train and val, or several times, and class folders that are empty or "
        "missing. The exit code is 1 if there are such problems, 0 if there are none, 2 if nothing could be checked.",
    )
    check.add_argument("folder", help="folder of images, as for training, or what `qtvit data pack` made of it")
    check.add_argument("--num-workers", type=_positive, default=8, help="threads that read images (default: 8)")
    check.add_argument("--min-side", type=_positive, default=32, metavar="PX", help="report smaller images (32)")
    check.add_argument("--json", type=_new_file, metavar="FILE", help="also write the whole report to FILE")
    check.set_defaults(command=check_data)

    models = commands.add_parser("models", help="list the models with size, cost and published accuracy")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.set_defaults(command=list_models)
    return parser


def train_classify(argv: list[str]) -> None:
    """``qtvit train classify``; its options are the fields of ``qtvit.training.config.TrainConfig``."""
    from qtvit.training.config import parse_config

    config = parse_config(argv)

    from qtvit.training.classify import run_training

    summary = run_training(config)
    if summary is not None:
        _print_summary(summary)


def quickstart(args: argparse.Namespace) -> None:
    """``qtvit quickstart``."""
    from qtvit.training.classify import run_training
    from qtvit.training.config import parse_config

    output = ["--output", args.output] if args.output else []
    summary = run_training(parse_config(["--recipe", "quickstart", "--device", args.device, *output]))
    if summary is None:
        return
    _print_summary(summary)
    command = _command()
    print(
        f"""
Next, with your own images in folders named by class (photos/cat/1.jpg, photos/dog/2.jpg, …):

    {command} train classify --model qtvit_1 --data photos --epochs 50
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg

and with the model just trained:  {command} eval {summary.run} --data digits"""
    )


def evaluate(args: argparse.Namespace) -> None:
    """``qtvit eval``."""
    from qtvit import console
    from qtvit.data import DIGITS, drop_broken
    from qtvit.deploy import Predictor
    from qtvit.errors import some
    from qtvit.training.evaluate import evaluate as run_evaluation
    from qtvit.training.evaluate import held_out_samples
    from qtvit.training.report import class_table, headline, scores, write_report
    from qtvit.training.run import clean_up, create_run_folder, default_workers, set_threads

    _make_parent(args.json)
    predictor = Predictor.load(args.run, args.device)
    samples, which = held_out_samples(args.data, predictor.info)
    num_workers = default_workers(args.data == DIGITS) if args.num_workers is None else args.num_workers
    set_threads(None, num_workers)
    folder = create_run_folder(args.output, f"eval-{_run_name(args.run)}-{Path(args.data).resolve().name}")
    with clean_up(folder):
        if args.on_bad_image == "skip":
            samples = drop_broken(samples)
        evaluation = run_evaluation(predictor, samples, batch_size=args.batch_size, num_workers=num_workers)
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
        _write_json(args.json, scores(evaluation, about))


def predict(args: argparse.Namespace) -> None:
    """``qtvit predict``."""
    from qtvit import console
    from qtvit.data import open_image
    from qtvit.deploy import Predictor
    from qtvit.deploy.annotate import FolderWriter, SheetWriter, shorten
    from qtvit.errors import some

    predictor = Predictor.load(args.run, args.device)
    files = _find_files(args.images)
    writer: FolderWriter | SheetWriter | None = None
    if args.save:
        save = args.save.resolve()
        if any(save in (file.resolve(), *file.resolve().parents) for file in files):
            raise ValueError(f"--save {args.save} holds images to predict; name another one")
        is_sheet = save.suffix.lower() in SHEET_SUFFIXES
        writer = SheetWriter(args.save) if is_sheet else FolderWriter(args.save)
        _make_parent(args.save if is_sheet else args.save / "image")
    _make_parent(args.json)
    _make_parent(args.csv)
    width = min(max(len(str(file)) for file in files), 120)
    label_width = min(max(map(len, predictor.classes)), 30)
    predictions = _predictions(predictor, list(files), args.top_k, args.batch_size, skip=args.on_bad_image == "skip")
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for file, prediction in console.progress(predictions, total=len(files), desc="Predicting", unit="image"):
        name = os.fsencode(file).decode(errors="replace")  # file names may be in another encoding
        if prediction is None:
            skipped.append(name)
            continue
        pairs = list(zip(prediction.labels, prediction.probabilities, strict=True))
        others = "   ".join(f"{shorten(label, label_width)} {p:.1%}" for label, p in pairs[1:])
        label = f"{shorten(prediction.label, label_width):<{label_width}}  {prediction.probability:>6.1%}"
        console.result(f"{name:<{width}}  {label}   {others}".rstrip())
        rows.append({"image": name, "predictions": [{"label": label, "probability": p} for label, p in pairs]})
        if writer:
            writer.add(open_image(file), files[file], prediction)
    if not rows:
        raise ValueError(f"none of the {len(skipped)} images can be read: {some(skipped)}")
    if skipped:
        console.say(f"skipped {len(skipped)} of {len(files)} images that cannot be read: {some(skipped)}")
    if args.json:
        _write_json(args.json, rows)
    if args.csv:
        _write_predictions(args.csv, rows)
    if writer:
        writer.close()
        print(f"written: {some(writer.written)}")


def _find_files(names: Sequence[str]) -> dict[Path, Path]:
    """The images that ``names``, of files or folders, stand for, each with its path in that folder."""
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


def _predictions(
    predictor: "Predictor", files: Sequence[Path], top_k: int, batch_size: int, skip: bool
) -> "Iterator[tuple[Path, Prediction | None]]":
    """The files with what is predicted of them; with ``skip``, None of one that cannot be read, instead of an error."""
    from qtvit import console
    from qtvit.data import find_broken

    for start in range(0, len(files), batch_size):
        readable = files[start : start + batch_size]
        try:
            predictions = list(predictor.iter_predict(readable, top_k, batch_size))
        except (ValueError, OSError):
            if not skip:
                raise
            with console.quiet():
                broken = [file for file, _ in find_broken([(file, 0) for file in readable])]
            readable = [file for file in readable if file not in broken]
            predictions = list(predictor.iter_predict(readable, top_k, batch_size))
        found = dict(zip(readable, predictions, strict=True))
        yield from ((file, found.get(file)) for file in files[start : start + batch_size])


def _write_predictions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV with one line per image and class."""
    from qtvit.files import write_text

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "rank", "label", "probability"])
    for row in rows:
        for rank, prediction in enumerate(row["predictions"], start=1):
            writer.writerow([row["image"], rank, prediction["label"], f"{prediction['probability']:.6f}"])
    write_text(path, table.getvalue())
    print(f"written: {path}")


def explain(args: argparse.Namespace) -> None:
    """``qtvit explain``."""
    from qtvit import console
    from qtvit.data import open_image
    from qtvit.data.transforms import parse_size
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
        check_maps(len(points) + grid[0] * grid[1], [1], "mean")  # before that many points are made
        points += grid_points(*grid, image.size)
    check_points(points, image.size)
    _make_parent(pictures[0])

    views: dict[str, View] = {}
    for run in (args.run, *args.compare):
        views[_unused(_run_name(run), views)] = look(run, image, img_size, args.device)
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


def push(args: argparse.Namespace) -> None:
    """``qtvit push``."""
    from qtvit.checkpoints import push_model

    place = push_model(
        args.run, args.name, folder=args.folder, private=args.private, license=args.license, dataset=args.dataset
    )
    if args.folder:
        print(f"written: {place} (model.safetensors, config.json, README.md)")
        print(f'it loads like a run folder, and as timm.create_model("local-dir:{place}", pretrained=True)')
        print(f"to upload it: {_command()} push {shlex.quote(place)} {args.name}")
    else:
        print(f"pushed: {place}")
        print(f"to use it: {_command()} predict hf-hub:{args.name} image.jpg")


def bench_train(args: argparse.Namespace) -> None:
    """``qtvit bench train``."""
    import torch

    from qtvit.bench.train import bench_training
    from qtvit.data.transforms import parse_size

    _make_parent(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = bench_training(
        args.models,
        args.peer,
        img_size=parse_size(args.img_size),
        batch_size=args.batch_size,
        rounds=args.rounds,
        device=args.device,
        autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(args.precision),
    )
    _print_settings(result)
    print(f"\n{'model':<20}{'kept MB/image':>14}{'ratio':>7}{'step ms':>10}  ratio (quartiles)")
    for name, row in result["models"].items():
        step = row["step_ratio"]
        print(
            f"{name:<20}{row['bytes_kept_per_image'] / 1e6:>14.1f}{row['bytes_kept_ratio']:>7.2f}"
            f"{1e3 * row['step_median_seconds']:>10.1f}  {step['median']:.2f} ({step['low']:.2f}–{step['high']:.2f})"
        )
    if args.json:
        _write_json(args.json, result)


def _print_settings(result: dict[str, Any]) -> None:
    """What a benchmark's numbers depend on."""
    print(", ".join(f"{name} {value}" for name, value in {**result["environment"], **result["settings"]}.items()))


def bench_loader(args: argparse.Namespace) -> None:
    """``qtvit bench loader``."""
    from qtvit.bench.loader import bench_loader as run_benchmark
    from qtvit.data.transforms import parse_size
    from qtvit.training.run import default_workers, set_threads

    _make_parent(args.json)
    num_workers = default_workers(in_memory=False) if args.num_workers is None else args.num_workers
    if num_workers < 0:
        raise ValueError(f"--num-workers must be 0 or more, got {num_workers}")
    set_threads(None, num_workers)
    result = run_benchmark(
        args.data,
        img_size=parse_size(args.img_size),
        batch_size=args.batch_size,
        num_workers=num_workers,
        batches=args.batches,
        rounds=args.rounds,
        auto_augment=args.auto_augment,
        device=args.device,
    )
    _print_settings(result)
    print(f"\n{'loader':<10}{'images/s':>10}  ratio (quartiles)")
    for name, row in result["loaders"].items():
        ratio = row["ratio"]
        print(
            f"{name:<10}{row['images_per_second']:>10.1f}  {ratio['median']:.2f} "
            f"({ratio['low']:.2f}–{ratio['high']:.2f})"
        )
    if args.json:
        _write_json(args.json, result)


def ablate(args: argparse.Namespace) -> None:
    """``qtvit ablate``."""
    from qtvit import console
    from qtvit.training.ablation import plan_ablation, run_ablation

    own = ["--seeds", str(args.seeds)]
    for option, value in (("--rows", args.rows), ("--output", args.output)):
        own += [option, value] if value is not None else []
    ablation = plan_ablation(
        args.table,
        args.rest,
        seeds=args.seeds,
        rows=None if args.rows is None else [name.strip() for name in args.rows.split(",")],
        output=args.output,
        command=shlex.join([_command(), "ablate", args.table, *own, *args.rest]),
    )
    lines = run_ablation(ablation)
    console.say("")
    for line in lines:
        console.result(line)
    print(f"results: {ablation.folder}/results.json, results.md, results.png")


def convert(args: argparse.Namespace) -> None:
    """``qtvit convert``."""
    released = args.to == "released"
    suffixes = [".safetensors", *([".pt", ".pth"] if released else [])]
    if args.dst.suffix.lower() not in suffixes:
        raise ValueError(f"{args.dst}: the file to write has to end in {' or '.join(suffixes)}")
    if args.dst.exists() and not args.overwrite:
        raise FileExistsError(f"{args.dst} exists already; name another file, or replace it with --overwrite")
    classes = None
    if args.classes:
        classes = [line.strip() for line in args.classes.read_text(encoding="utf-8").splitlines() if line.strip()]

    from qtvit import checkpoints

    conversion = checkpoints.convert(
        args.src, model=args.model, kernel=args.kernel, img_size=args.img_size, ema=args.ema, classes=classes
    )
    if released:
        checkpoints.save_released(args.dst, conversion.state_dict, conversion.info)
    else:
        _make_parent(args.dst)
        checkpoints.save_model(args.dst, conversion.state_dict, conversion.info)
    print(conversion.report(args.verbose))
    print(f"written: {args.dst}")


def pack_data(args: argparse.Namespace) -> None:
    """``qtvit data pack``."""
    from qtvit.data import pack_folder

    index = pack_folder(args.folder, args.out, args.shard_size * 1_000_000)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    num_bytes = sum(shard.num_bytes for shard in shards)
    images = " and ".join(f"{len(split.path):,} {name}" for name, split in index.splits.items())
    print(
        f"packed {images} images of {len(index.classes)} classes into {len(shards)} "
        f"shard{'s' * (len(shards) != 1)}, {num_bytes / 1e6:,.1f} MB: {args.out}"
    )


def check_data(args: argparse.Namespace) -> int:
    """``qtvit data check``; 1 if there are problems."""
    from qtvit import console
    from qtvit.data import check_data as run_check

    _make_parent(args.json)
    report = run_check(args.folder, num_threads=args.num_workers, min_side=args.min_side)
    for line in report.lines():
        console.result(line)
    if args.json:
        _write_json(args.json, {"data": args.folder, "num_problems": report.num_problems, **asdict(report)})
    return int(report.num_problems > 0)


def list_models(args: argparse.Namespace) -> None:
    """``qtvit models``."""
    import torch

    from qtvit.models import ARCHITECTURES, PUBLISHED_ACCURACY, build_model, model_cost

    costs = {}
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            costs[name] = model_cost(build_model(name), (architecture.img_size, architecture.img_size))
    if args.json:
        rows = [
            {
                "model": name,
                "img_size": ARCHITECTURES[name].img_size,
                "num_params": cost.num_params,
                "num_macs": cost.num_macs,
                "published_imagenet_top1_top5": PUBLISHED_ACCURACY.get(name),
            }
            for name, cost in costs.items()
        ]
        print(json.dumps(rows, indent=2))
        return
    print(f"{'model':<12}{'px':>5}{'params':>11}{'MACs':>11}{'top-1 *':>10}{'top-5 *':>9}")
    for name, cost in costs.items():
        published = [f"{accuracy:.1f}" for accuracy in PUBLISHED_ACCURACY.get(name, ())] or ["–", "–"]
        print(
            f"{name:<12}{ARCHITECTURES[name].img_size:>5}{cost.num_params / 1e6:>9.2f} M{cost.num_macs / 1e9:>9.3f} G"
            f"{published[0]:>10}{published[1]:>9}"
        )
    print("* ImageNet-1k accuracy in percent as published by the paper's authors, not reproduced here")


def _command() -> str:
    """What to type for ``qtvit``: make calls the command by its path."""
    called = Path(sys.argv[0])
    return "qtvit" if shutil.which("qtvit") or called.name != "qtvit" else str(called)


def _print_summary(summary: "RunSummary") -> None:
    top5 = f" (top-5 {summary.top5:.2f} %)" if summary.top5 < 100 else ""
    print(
        f"""
Done: {summary.run}
  top-1        {summary.top1:.2f} % on the held-out images{top5}
  parameters   {summary.num_params / 1e6:.2f} M
  MACs         {summary.num_macs / 1e6:.1f} M per image
  speed        {summary.images_per_second:.0f} images/s (forward pass on the training device)
  training     {summary.train_seconds:.0f} s
  files        best.safetensors (the model), curves, confusion, calibration, mistakes and predictions as .png,
               summary.json, scores.json, per_class.csv, config.yaml"""
    )


def _run_name(run: str) -> str:
    """What to call the run or model that a command was given: the folder of the former, the file of the latter."""
    from qtvit.checkpoints import BEST

    path = Path(run).resolve()
    path = path.parent if path.name == BEST else path
    return path.name if path.is_dir() else path.stem


def _unused(name: str, taken: Container[str]) -> str:
    """``name``, numbered if it is taken."""
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name} ({number})"
    return unused


def _make_parent(path: Path | None) -> None:
    """The folder of an output file, made and tried out before the work that the file is to hold."""
    from qtvit.files import open_folder

    if path is not None:
        open_folder(path.parent)


def _write_json(path: Path, content: object) -> None:
    from qtvit.files import write_text

    write_text(path, json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
