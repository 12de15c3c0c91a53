"""Train models: ``qtvit quickstart``, ``train`` and ``ablate``."""

import argparse
import shlex
from functools import partial
from typing import TYPE_CHECKING, Any

from .common import Commands, command_name, positive

if TYPE_CHECKING:
    from qtvit.training.job import Summary


def add_train(commands: Commands) -> None:
    """Add the commands that train."""
    quick = commands.add_parser(
        "quickstart",
        help="train the smallest model on built-in digits: a classifier in about a minute, others in a few",
    )
    quick.add_argument("--task", default="classify", help="classify, detect or segment (classify)")
    quick.add_argument("--output", help="run folder to create (default: runs/qtvit_nano-DATA, numbered when taken)")
    quick.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    quick.set_defaults(command=quickstart)

    train: Any = commands.add_parser("train", help="train a model on your images")
    train.complete = partial(_add_tasks, train)

    ablation = commands.add_parser(
        "ablate",
        help="train the rows of a table of the paper at the same budget, with several seeds, and compare them",
        description="Trains every row of a table with every seed, run by run, and compares the rows with the default. "
        "The same command again goes on with what is missing; several processes with the same command share the runs.",
        epilog="The other options are those of `qtvit train classify`, such as --data, --model, --epochs, "
        "--train-images, --recipe; they hold for all rows.",
    )
    add = ablation.add_argument
    add("table", help="table2 (kernels), table3 (Kronecker products), table7 (softmax residual), ape, or shortcut")
    add("--seeds", type=positive, default=3, help="trains with seeds 0 to SEEDS - 1 (default: 3)")
    add("--rows", metavar="A,B,…", help="some rows of the table; the default row is always trained")
    add("--output", metavar="FOLDER", help="default: runs/ablate-TABLE-MODEL-DATA")
    ablation.set_defaults(command=ablate, own_options=True)


def _add_tasks(train: argparse.ArgumentParser) -> None:
    from qtvit import tasks

    subparsers = train.add_subparsers(metavar="TASK", required=True)
    for task in tasks.TASKS.values():
        parser = subparsers.add_parser(task.name, help=task.what, add_help=False)
        parser.set_defaults(command=train_task, task=task.name, own_options=True)


def train_task(args: argparse.Namespace) -> None:
    """``qtvit train TASK``; its options are the fields of the task's configuration, such as
    ``qtvit.tasks.classify.config.ClassifyConfig``.
    """
    _train(args.task, args.rest)


def quickstart(args: argparse.Namespace) -> None:
    """``qtvit quickstart``."""
    from qtvit import tasks

    start = tasks.get(args.task).load("commands").quickstart
    if start is None:
        raise ValueError(f"there is no quickstart for --task {args.task}")
    argv = ["--recipe", start.recipe, "--device", args.device, *(["--output", args.output] if args.output else [])]
    if start.scenes is not None:
        from qtvit.tasks.scenes import write_scenes

        write_scenes(start.scenes, args.task, start.num_train, start.num_val)
        argv += ["--data", start.scenes]
    summary = _train(args.task, argv)
    if summary is not None:
        print(start.next.format(command=command_name(), run=summary.run, data=start.scenes))


def _train(task: str, argv: list[str]) -> "Summary | None":
    """Train and print the summary; under torchrun only the first process has one."""
    from qtvit import tasks
    from qtvit.training.job import train
    from qtvit.training.options import parse_config

    summary = train(parse_config(argv, tasks.get(task).load("config")))
    if summary is not None:
        print(f"\nDone: {summary.run}")
        for name, text in summary.lines():
            print(f"  {name:<12} {text}")
    return summary


def ablate(args: argparse.Namespace) -> None:
    """``qtvit ablate``."""
    from qtvit import console
    from qtvit.ablation.run import plan_ablation, run_ablation

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
