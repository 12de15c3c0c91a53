"""Preparing image folders: ``qtvit data``."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .common import Commands, make_parent, new_file, positive, write_json


def add_data(commands: Commands) -> None:
    """Add ``data pack`` and ``data check``."""
    data = commands.add_parser("data", help="prepare image folders: pack them into shards, check them")
    what = data.add_subparsers(metavar="WHAT", required=True)
    pack = what.add_parser(
        "pack", help="copy a folder of images into few large tar files, which other commands take as --data too"
    )
    pack.add_argument("folder", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg alone")
    pack.add_argument("out", type=Path, help="folder to create")
    pack.add_argument("--shard-size", type=positive, default=256, metavar="MB", help="of each tar file (default: 256)")
    pack.set_defaults(command=pack_data)
    check = what.add_parser(
        "check",
        help="read every image, and list what is broken, doubled, mislabelled or too small",
        description="Reads every image of a folder or packed folder. Reports images that cannot be read or are tiny, "
        "the same image in several classes, in train and val, or several times, and class folders that are empty or "
        "missing. The exit code is 1 if there are such problems, 0 if there are none, 2 if nothing could be checked.",
    )
    check.add_argument("folder", help="folder of images, as for training, or what `qtvit data pack` made of it")
    check.add_argument("--num-workers", type=positive, default=8, help="threads that read images (default: 8)")
    check.add_argument("--min-side", type=positive, default=32, metavar="PX", help="report smaller images (32)")
    check.add_argument("--json", type=new_file, metavar="FILE", help="also write the whole report to FILE")
    check.set_defaults(command=check_data)


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

    make_parent(args.json)
    report = run_check(args.folder, num_threads=args.num_workers, min_side=args.min_side)
    for line in report.lines():
        console.result(line)
    if args.json:
        write_json(args.json, {"data": args.folder, "num_problems": report.num_problems, **asdict(report)})
    return int(report.num_problems > 0)
