"""Prepare data: ``qtvit data``."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .common import Commands, add_task_options, make_parent, new_file, positive, take_task_options, write_json


def add_data(commands: Commands) -> None:
    """Add ``data pack``, ``data check`` and ``data scenes``."""
    data = commands.add_parser("data", help="prepare data: pack images into shards, check data, draw sample scenes")
    what = data.add_subparsers(metavar="WHAT", required=True)
    pack = what.add_parser(
        "pack", help="copy a folder of images into few large tar files, which other commands take as --data too"
    )
    add = pack.add_argument
    add("folder", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg alone")
    add("out", type=Path, help="folder to create")
    add("--shard-size", type=positive, default=256, metavar="MB", help="of each tar file (default: 256)")
    pack.set_defaults(command=pack_data)
    check: Any = what.add_parser(
        "check",
        help="read every image, and list what is broken, doubled, mislabelled or too small",
        description="Reads every image of a data set, and reports all that is wrong at once. For classification, of a "
        "folder or packed folder: images that cannot be read or are tiny, the same image in several classes, in train "
        "and val, or several times, and class folders that are empty or missing. For detection, in COCO's layout: "
        "annotation files with errors, boxes outside their image, images that are missing or of another size. For "
        "segmentation: masks that do not fit their images or classes. The exit code is 1 if there are such problems, "
        "0 if there are none, 2 if nothing could be checked.",
    )
    add = check.add_argument
    add("folder", help="folder of data, as for training; for classify also what `qtvit data pack` made")
    add("--task", default="classify", help="classify, detect or segment (classify)")
    add("--num-workers", type=positive, default=8, help="threads that read images (default: 8)")
    add("--json", type=new_file, metavar="FILE", help="also write the whole report to FILE")
    check.complete = partial(add_task_options, check, "check_options")
    check.set_defaults(command=check_data)
    scenes = what.add_parser(
        "scenes", help="draw sample data for detection or segmentation: handwritten digits among clutter"
    )
    add = scenes.add_argument
    add("folder", type=Path, help="folder to create; one with the same scenes is left as it is")
    add("--task", choices=("detect", "segment"), default="detect", help="boxes and masks, or masks (detect)")
    add("--num-train", type=positive, default=1000, metavar="N", help="scenes to train on (1000)")
    add("--num-val", type=positive, default=200, metavar="N", help="held-out scenes (200)")
    add("--seed", type=int, default=0, help="of the scenes (default: 0)")
    scenes.set_defaults(command=draw_scenes)


def pack_data(args: argparse.Namespace) -> None:
    """``qtvit data pack``."""
    from qtvit.tasks.classify.pack import pack_folder

    index = pack_folder(args.folder, args.out, args.shard_size * 1_000_000)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    num_bytes = sum(shard.num_bytes for shard in shards)
    images = " and ".join(f"{len(split.path):,} {name}" for name, split in index.splits.items())
    print(
        f"packed {images} images of {len(index.classes)} classes into {len(shards)} "
        f"shard{'s' * (len(shards) != 1)}, {num_bytes / 1e6:,.1f} MB: {args.out}"
    )


def check_data(args: argparse.Namespace) -> int:
    """``qtvit data check``; returns 1 if there are problems."""
    from qtvit import console, tasks

    make_parent(args.json)
    check = tasks.get(args.task).load("check")
    options = take_task_options(args, "check_options", args.task)
    report = check(args.folder, num_threads=args.num_workers, **options)
    for line in report.lines():
        console.result(line)
    if args.json:
        write_json(args.json, {"data": args.folder, "num_problems": report.num_problems, **asdict(report)})
    return int(report.num_problems > 0)


def draw_scenes(args: argparse.Namespace) -> None:
    """``qtvit data scenes``."""
    from qtvit.tasks.scenes import write_scenes

    write_scenes(args.folder, args.task, args.num_train, args.num_val, args.seed)
    print(f"{args.num_train:,} train and {args.num_val:,} val scenes for --task {args.task}: {args.folder}")
