"""The ``qtvit`` command.

It stands beside the package, not in it: importing ``qtvit`` registers models with timm, which takes seconds, and
``qtvit --help`` should not. Each command imports what it needs when it runs.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtvit.training.classify import RunSummary

USER_ERRORS = (ValueError, OSError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv``; 0 if it worked, 2 with one line on stderr if the user has to change something."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    args, rest = _parser().parse_known_args(argv)
    if rest and args.command != train_classify:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.command(rest if args.command == train_classify else args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("qtvit"):
            raise
        print(f"qtvit: error: {error.name} is not installed; pip install 'qtvit[train]'", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"qtvit: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qtvit",
        description="QT-ViT: vision backbones with quadratic-Taylor linear attention. See also `qtvit COMMAND --help`.",
        epilog="--debug with any command shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    quick = commands.add_parser("quickstart", help="train the smallest model on built-in digits, in about a minute")
    quick.add_argument("--output", help="run folder to create (default: runs/qtvit_nano-digits, numbered when taken)")
    quick.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    quick.set_defaults(command=quickstart)

    train = commands.add_parser("train", help="train a model on your images")
    tasks = train.add_subparsers(metavar="TASK", required=True)
    classify = tasks.add_parser("classify", help="image classification", add_help=False, allow_abbrev=False)
    classify.set_defaults(command=train_classify)

    evaluation = commands.add_parser("eval", help="score a trained model on labelled images")
    evaluation.add_argument("run", help="run folder or model file")
    evaluation.add_argument(
        "--data", required=True, help="folder of CLASS/*.jpg, folder with val/CLASS/*.jpg, or digits"
    )
    evaluation.add_argument("--batch-size", type=_positive, default=64)
    evaluation.add_argument(
        "--num-workers", type=int, help="processes that load images (default: one per core less one)"
    )
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    evaluation.add_argument("--json", type=_new_file, metavar="FILE", help="also write the scores to FILE")
    evaluation.set_defaults(command=evaluate)

    prediction = commands.add_parser("predict", help="label images with a trained model")
    prediction.add_argument("run", help="run folder or model file")
    prediction.add_argument("images", nargs="+", help="image files, or folders of them")
    prediction.add_argument("--top-k", type=_positive, default=5, help="classes to show per image (default: 5)")
    prediction.add_argument("--batch-size", type=_positive, default=32)
    prediction.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    prediction.add_argument("--json", type=_new_file, metavar="FILE", help="also write the predictions to FILE")
    prediction.set_defaults(command=predict)

    models = commands.add_parser("models", help="list the models with size, cost and published accuracy")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    models.set_defaults(command=list_models)
    return parser


def train_classify(argv: list[str]) -> None:
    """``qtvit train classify``; its options are the fields of ``qtvit.training.config.TrainConfig``."""
    from qtvit.training.config import parse_config

    config = parse_config(argv)

    from qtvit.training.classify import train_classifier

    _print_summary(train_classifier(config))


def quickstart(args: argparse.Namespace) -> None:
    """``qtvit quickstart``."""
    from qtvit.training.classify import train_classifier
    from qtvit.training.config import parse_config

    output = ["--output", args.output] if args.output else []
    summary = train_classifier(parse_config(["--recipe", "quickstart", "--device", args.device, *output]))
    _print_summary(summary)
    called = Path(sys.argv[0])  # make calls the command by its path
    command = "qtvit" if shutil.which("qtvit") or called.name != "qtvit" else str(called)
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
    from qtvit.data import DIGITS
    from qtvit.deploy import Predictor
    from qtvit.training.evaluate import evaluate as run_evaluation
    from qtvit.training.evaluate import held_out_samples
    from qtvit.training.run import default_workers, set_threads

    _make_parent(args.json)
    predictor = Predictor.load(args.run, args.device)
    samples, which = held_out_samples(args.data, predictor.info)
    num_workers = default_workers(args.data == DIGITS) if args.num_workers is None else args.num_workers
    set_threads(None, num_workers)
    evaluation = run_evaluation(predictor, samples, batch_size=args.batch_size, num_workers=num_workers)
    scores = {"run": args.run, "data": args.data, "images": which, **evaluation.metrics()}
    print(f"top-1 {scores['top1']:.2f} %   top-5 {scores['top5']:.2f} %   of {scores['num_images']} images: {which}")
    if args.json:
        _write_json(args.json, scores)


def predict(args: argparse.Namespace) -> None:
    """``qtvit predict``."""
    from tqdm import tqdm

    from qtvit.data import find_images
    from qtvit.deploy import Predictor

    _make_parent(args.json)
    files: list[Path] = []
    for name in args.images:
        found = find_images(Path(name)) if Path(name).is_dir() else [Path(name)]
        if not found:
            raise ValueError(f"{name}: no images in this folder")
        files += found
    predictor = Predictor.load(args.run, args.device)
    predictions = predictor.iter_predict(files, args.top_k, args.batch_size)
    rows = []
    for file, prediction in zip(
        files, tqdm(predictions, total=len(files), unit="image", leave=False, disable=None), strict=True
    ):
        tqdm.write(f"{file}: {prediction}")
        pairs = zip(prediction.labels, prediction.probabilities, strict=True)
        rows.append({"image": str(file), "predictions": [{"label": label, "probability": p} for label, p in pairs]})
    if args.json:
        _write_json(args.json, rows)


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
  files        best.safetensors (the model), curves.png, confusion.png, predictions.png, summary.json, config.yaml"""
    )


def _make_parent(path: Path | None) -> None:
    """The folder of an output file, made before the work that the file is to hold."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


def _write_json(path: Path, content: object) -> None:
    from qtvit.files import write_text

    write_text(path, json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
