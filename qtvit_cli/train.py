"""Training: ``qtvit quickstart``, ``train`` and ``ablate``."""

import argparse
import shlex
from typing import TYPE_CHECKING

from .common import Commands, command_name, positive

if TYPE_CHECKING:
    from qtvit.training.classify import RunSummary


def add_train(commands: Commands) -> None:
    """Add the commands that train."""
    quick = commands.add_parser("quickstart", help="train the smallest model on built-in digits, in about a minute")
    quick.add_argument("--output", help="run folder to create (default: runs/qtvit_nano-digits, numbered when taken)")
    quick.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    quick.set_defaults(command=quickstart)

    train = commands.add_parser("train", help="train a model on your images")
    tasks = train.add_subparsers(metavar="TASK", required=True)
    classify = tasks.add_parser("classify", help="image classification", add_help=False)
    classify.set_defaults(command=train_classify)

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
    ablation.add_argument("--seeds", type=positive, default=3, help="trains with seeds 0 to SEEDS - 1 (default: 3)")
    ablation.add_argument("--rows", metavar="A,B,…", help="some rows of the table; the default row is always trained")
    ablation.add_argument("--output", metavar="FOLDER", help="default: runs/ablate-TABLE-MODEL-DATA")
    ablation.set_defaults(command=ablate)


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
    command = command_name()
    print(
        f"""
Next, with your own images in folders named by class (photos/cat/1.jpg, photos/dog/2.jpg, …):

    {command} train classify --model qtvit_1 --data photos --epochs 50
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg

and with the model just trained:  {command} eval {summary.run} --data digits"""
    )


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
        command=shlex.join([command_name(), "ablate", args.table, *own, *args.rest]),
    )
    lines = run_ablation(ablation)
    console.say("")
    for line in lines:
        console.result(line)
    print(f"results: {ablation.folder}/results.json, results.md, results.png")


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
