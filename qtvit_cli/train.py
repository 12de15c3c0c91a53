"""Training: ``qtvit quickstart``, ``train`` and ``ablate``."""

import argparse
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .common import Commands, command_name, positive

if TYPE_CHECKING:
    from qtvit.training.job import Summary

TASKS = {
    "classify": "image classification",
    "detect": "object detection, with masks if the data have such",
    "segment": "semantic segmentation",
}
"""What can be trained, and what that is."""


@dataclass(frozen=True)
class Quickstart:
    """A training on data that come with the package.

    Attributes:
        recipe: its name.
        scenes: folder that sample scenes are written to first; None if there is nothing to write.
        num_train, num_val: how many.
        next: what to do after it, with places for the command and the run.
    """

    recipe: str
    scenes: str | None = None
    num_train: int = 0
    num_val: int = 0
    next: str = ""


QUICKSTARTS = {
    "classify": Quickstart(
        "quickstart",
        next="""
Next, with your own images in folders named by class (photos/cat/1.jpg, photos/dog/2.jpg, …):

    {command} train classify --model qtvit_1 --data photos --epochs 50
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg

and with the model just trained:  {command} eval {run} --data digits""",
    ),
    "detect": Quickstart(
        "quickstart/detect",
        scenes="runs/digit-scenes-detect",
        num_train=800,
        num_val=100,
        next="""
Next, with your own images and boxes in COCO's layout (photos/annotations/instances_train.json, photos/train/1.jpg, …):

    {command} train detect --model qtvit_1 --data photos --checkpoint CLASSIFIER
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg --save found

and with the model just trained:

    {command} eval {run} --data {data}
    {command} predict {run} {data}/val --save found.png""",
    ),
    "segment": Quickstart(
        "quickstart/segment",
        scenes="runs/digit-scenes-segment",
        num_train=3200,
        num_val=100,
        next="""
Next, with your own images and masks (photos/train/images/1.jpg, photos/train/masks/1.png, and photos/val the same):

    {command} data check photos --task segment
    {command} train segment --model qtvit_1 --data photos --checkpoint CLASSIFIER
    {command} eval runs/qtvit_1-photos --data photos
    {command} predict runs/qtvit_1-photos some_image.jpg --save found

and with the model just trained:

    {command} eval {run} --data {data}
    {command} predict {run} {data}/val/images --save found.png""",
    ),
}
"""By task."""


def add_train(commands: Commands) -> None:
    """Add the commands that train."""
    quick = commands.add_parser(
        "quickstart",
        help="train the smallest model on built-in digits: a classifier in about a minute, others in a few",
    )
    quick.add_argument("--task", choices=list(QUICKSTARTS), default="classify", help="what to train (classify)")
    quick.add_argument("--output", help="run folder to create (default: runs/qtvit_nano-DATA, numbered when taken)")
    quick.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    quick.set_defaults(command=quickstart)

    train = commands.add_parser("train", help="train a model on your images")
    tasks = train.add_subparsers(metavar="TASK", required=True)
    for task, what in TASKS.items():
        tasks.add_parser(task, help=what, add_help=False).set_defaults(command=train_task, task=task, own_options=True)

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
    ablation.set_defaults(command=ablate, own_options=True)


def train_task(args: argparse.Namespace) -> None:
    """``qtvit train TASK``; its options are the fields of the task's configuration, such as
    ``qtvit.training.classify_config.ClassifyConfig``.
    """
    from qtvit.training.options import parse_config
    from qtvit.training.tasks import config_class, run_task

    _print_summary(run_task(parse_config(args.rest, config_class(args.task))))


def quickstart(args: argparse.Namespace) -> None:
    """``qtvit quickstart``."""
    from qtvit.training.options import parse_config
    from qtvit.training.tasks import config_class, run_task

    start = QUICKSTARTS[args.task]
    argv = ["--recipe", start.recipe, "--device", args.device, *(["--output", args.output] if args.output else [])]
    if start.scenes is not None:
        from qtvit.data import write_scenes

        write_scenes(start.scenes, args.task, start.num_train, start.num_val)
        argv += ["--data", start.scenes]
    summary = run_task(parse_config(argv, config_class(args.task)))
    _print_summary(summary)
    if summary is not None:
        print(start.next.format(command=command_name(), run=summary.run, data=start.scenes))


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


def _print_summary(summary: "Summary | None") -> None:
    """Of processes under torchrun, the first one has a summary."""
    if summary is not None:
        print(f"\nDone: {summary.run}")
        for name, text in summary.lines():
            print(f"  {name:<12} {text}")
