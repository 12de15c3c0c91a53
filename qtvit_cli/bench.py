"""Measuring models side by side: ``qtvit bench``."""

import argparse
from typing import Any

from .common import Commands, make_parent, new_file, positive, write_json


def add_bench(commands: Commands) -> None:
    """Add what ``qtvit bench`` can measure."""
    bench = commands.add_parser("bench", help="measure models side by side")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    steps = kinds.add_parser("train", help="time of a training step, and memory kept for its backward pass")
    steps.add_argument("models", nargs="*", default=["qtvit_1"], help="ours or timm's (default: qtvit_1)")
    steps.add_argument("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    steps.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    steps.add_argument("--batch-size", type=positive, default=16)
    steps.add_argument("--rounds", type=positive, default=10, help="steps of each model to time (default: 10)")
    steps.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    steps.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    steps.add_argument("--threads", type=positive, help="CPU threads (default: one per core)")
    steps.add_argument("--json", type=new_file, metavar="FILE", help="also write all samples to FILE")
    steps.set_defaults(command=bench_train)
    loader = kinds.add_parser("loader", help="images per second of the training loader, next to timm's")
    loader.add_argument("data", help="folder with train/CLASS/*.jpg, or CLASS/*.jpg alone")
    loader.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    loader.add_argument("--batch-size", type=positive, default=128)
    loader.add_argument("--num-workers", type=int, help="processes that load images (default: one per core less one)")
    loader.add_argument("--batches", type=positive, default=8, help="batches of a turn (default: 8)")
    loader.add_argument("--rounds", type=positive, default=10, help="turns of each loader to time (default: 10)")
    loader.add_argument("--auto-augment", default="rand-n1-m3-mstd1.0-inc1", help="default: %(default)s")
    loader.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    loader.add_argument("--json", type=new_file, metavar="FILE", help="also write all samples to FILE")
    loader.set_defaults(command=bench_loader)


def bench_train(args: argparse.Namespace) -> None:
    """``qtvit bench train``."""
    import torch

    from qtvit.bench.train import bench_training
    from qtvit.data.transforms import parse_size

    make_parent(args.json)
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
        write_json(args.json, result)


def _print_settings(result: dict[str, Any]) -> None:
    """What a benchmark's numbers depend on."""
    print(", ".join(f"{name} {value}" for name, value in {**result["environment"], **result["settings"]}.items()))


def bench_loader(args: argparse.Namespace) -> None:
    """``qtvit bench loader``."""
    from qtvit.bench.loader import bench_loader as run_benchmark
    from qtvit.data.transforms import parse_size
    from qtvit.training.run import default_workers, set_threads

    make_parent(args.json)
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
        write_json(args.json, result)
