"""Measuring models side by side: ``qtvit bench``."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import Commands, command_name, make_parent, new_file, pick, positive, write_json

MODELS = (
    "names, ours or timm's, run folders, model files; qtvit_1:softmax has another kernel, plain:qtvit_1 nothing fused, "
    "released:qtvit_1 its attention written as in the authors' code"
)
RUNTIMES = "eager, channels_last, compile, compile_frozen, onnxruntime, openvino"


def add_bench(commands: Commands) -> None:
    """Add what ``qtvit bench`` can measure."""
    bench = commands.add_parser("bench", help="measure models side by side")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    for add_options, command, rounds in (
        (_add_latency, bench_latency, 20),
        (_add_scaling, bench_scaling, 10),
        (_add_pareto, bench_pareto, 10),
        (_add_train, bench_train, 10),
        (_add_loader, bench_loader, 10),
    ):
        parser = add_options(kinds)
        parser.add_argument(
            "--rounds", type=positive, default=rounds, help=f"turns of each to time (default: {rounds})"
        )
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        parser.add_argument("--threads", type=positive, help="CPU threads (default: one per core)")
        parser.add_argument(
            "--output", type=new_file, metavar="NAME", help="write all samples to NAME.json and a picture to NAME.png"
        )
        parser.add_argument(
            "--json", type=new_file, metavar="FILE", help="write all samples to FILE, without a picture"
        )
        parser.set_defaults(command=command)


def _add_latency(kinds: Commands) -> argparse.ArgumentParser:
    latency = kinds.add_parser(
        "latency",
        help="time of a forward pass by runtime, precision, image size and batch size",
        description="Times models next to a peer, each in its inference form, in turns. Options that are lists are "
        "separated by commas; all their combinations are measured.",
    )
    add = latency.add_argument
    add("models", nargs="*", default=["qtvit_1"], help=f"{MODELS}; or exported files (qtvit_1)")
    add("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    add("--runtime", default="eager", metavar="LIST", help=f"of {RUNTIMES} (default: eager)")
    add("--precision", default="fp32", metavar="LIST", help="of fp32, bf16, fp16 (default: fp32)")
    add("--img-size", default="224", metavar="LIST", help="of sides or HEIGHTxWIDTHs (default: 224)")
    add("--batch-size", default="1", metavar="LIST", help="of images per forward pass (default: 1)")
    add("--memory", action="store_true", help="also measure peak memory, in a process for each")
    add("--no-peak", action="store_true", help="do not measure matrix products to compare with")
    return latency


def _add_scaling(kinds: Commands) -> argparse.ArgumentParser:
    scaling = kinds.add_parser(
        "scaling",
        help="how time grows with the image, for linear attention and softmax",
        description="Times attention alone with several kernels at growing numbers of tokens, and networks with these "
        "kernels at growing image sizes, in fp32; fits exponents, and says from where on the first kernel is faster.",
    )
    add = scaling.add_argument
    add("--model", default="qtvit_1", help="one of ours (default: qtvit_1)")
    add("--peer", default="efficientvit_b1", help="another network (default: efficientvit_b1)")
    add("--kernel", default="taylor2,softmax,relu", metavar="LIST", help="default: %(default)s")
    add("--sizes", default="224,384,512,768,1024,1536,2048", metavar="LIST", help="default: %(default)s")
    add("--head-dim", default="16,32", metavar="LIST", help="channels per head (default: %(default)s)")
    part = scaling.add_mutually_exclusive_group()
    part.add_argument("--op-only", action="store_true", help="attention alone")
    part.add_argument("--model-only", action="store_true", help="whole networks alone")
    add("--runtime", default="eager", help=f"of the networks: {RUNTIMES} (default: eager)")
    add("--batch-size", type=positive, default=1)
    add("--max-seconds", type=float, default=5, metavar="S", help="measure nothing larger than what takes longer (5)")
    return scaling


def _add_pareto(kinds: Commands) -> argparse.ArgumentParser:
    pareto = kinds.add_parser(
        "pareto",
        help="published accuracy against the latency measured here",
        description="Times models at the image size of their published ImageNet top-1 and says which are on the front: "
        "those that no other is both quicker and more accurate than.",
    )
    add = pareto.add_argument
    add("models", nargs="*", help="names, families or patterns such as 'efficientvit_b*' (default: all that are known)")
    add("--peer", default="efficientvit_b1", help="what all take turns with (default: efficientvit_b1)")
    add("--runtime", default="eager", help=f"{RUNTIMES} (default: eager)")
    add("--precision", default="fp32", help="fp32, bf16 or fp16 (default: fp32)")
    add("--batch-size", type=positive, default=1)
    return pareto


def _add_train(kinds: Commands) -> argparse.ArgumentParser:
    steps = kinds.add_parser("train", help="time of a training step, and memory kept for its backward pass")
    add = steps.add_argument
    add("models", nargs="*", default=["qtvit_1", "qtvit_1:softmax"], help=f"{MODELS} (qtvit_1 qtvit_1:softmax)")
    add("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    add("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    add("--batch-size", type=positive, default=16)
    add("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    explanation = "as in training: less memory, more time (qtvit's models only)"
    add("--recompute-activations", action=argparse.BooleanOptionalAction, default=False, help=explanation)
    return steps


def _add_loader(kinds: Commands) -> argparse.ArgumentParser:
    loader = kinds.add_parser("loader", help="images per second of the training loader, next to timm's")
    add = loader.add_argument
    add("data", help="folder with train/CLASS/*.jpg, or CLASS/*.jpg alone")
    add("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    add("--batch-size", type=positive, default=128)
    add("--num-workers", type=int, help="processes that load images (default: one per core less one)")
    add("--batches", type=positive, default=8, help="batches of a turn (default: 8)")
    add("--auto-augment", default="rand-n1-m3-mstd1.0-inc1", help="default: %(default)s")
    return loader


def bench_latency(args: argparse.Namespace) -> None:
    """``qtvit bench latency``."""
    from qtvit.bench.latency import bench_latency as measure
    from qtvit.data.preprocess import parse_size

    _run(
        args,
        "latency",
        measure,
        **pick(args, "models", "peer", "memory"),
        runtimes=_split(args.runtime, "--runtime"),
        precisions=_split(args.precision, "--precision"),
        img_sizes=[parse_size(part) for part in _split(args.img_size, "--img-size")],
        batch_sizes=_whole_numbers(args.batch_size, "--batch-size"),
        peak=not args.no_peak,
    )


def bench_scaling(args: argparse.Namespace) -> None:
    """``qtvit bench scaling``."""
    from qtvit.bench.scaling import bench_scaling as measure

    _run(
        args,
        "scaling",
        measure,
        **pick(args, "model", "peer", "runtime", "batch_size", "max_seconds"),
        kernels=_split(args.kernel, "--kernel"),
        sizes=_whole_numbers(args.sizes, "--sizes"),
        head_dims=_whole_numbers(args.head_dim, "--head-dim"),
        attention=not args.model_only,
        network=not args.op_only,
    )


def bench_pareto(args: argparse.Namespace) -> None:
    """``qtvit bench pareto``."""
    from qtvit.bench.pareto import bench_pareto as measure

    _run(args, "pareto", measure, **pick(args, "models", "peer", "runtime", "precision", "batch_size"))


def bench_train(args: argparse.Namespace) -> None:
    """``qtvit bench train``."""
    import torch

    from qtvit.bench.train import bench_training
    from qtvit.data.preprocess import parse_size

    _run(
        args,
        "train",
        bench_training,
        **pick(args, "models", "peer", "batch_size", "recompute_activations"),
        img_size=parse_size(args.img_size),
        autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(args.precision),
    )


def bench_loader(args: argparse.Namespace) -> None:
    """``qtvit bench loader``."""
    from qtvit.bench.loader import bench_loader as measure
    from qtvit.data.preprocess import parse_size
    from qtvit.training.run import default_workers, set_threads

    num_workers = default_workers(in_memory=False) if args.num_workers is None else args.num_workers
    if num_workers < 0:
        raise ValueError(f"--num-workers must be 0 or more, got {num_workers}")
    set_threads(args.threads, num_workers)
    options = pick(args, "data", "batch_size", "batches", "auto_augment")
    _run(args, "loader", measure, **options, img_size=parse_size(args.img_size), num_workers=num_workers)


def _run(args: argparse.Namespace, kind: str, measure: Callable[..., dict[str, Any]], **options: Any) -> None:
    """Call ``measure`` with ``options`` and those that all benchmarks share; print the result, write the files."""
    import torch

    from qtvit.bench import tables

    # What can fail about the output, a folder or matplotlib that is missing, has to fail before minutes of measuring.
    files: list[Path] = [args.json] if args.json else []
    if args.output:
        from qtvit.bench import plots

        name = args.output.with_suffix("") if args.output.suffix in (".json", ".png") else args.output
        files.append(name.with_name(f"{name.name}.json"))
    for file in files:
        make_parent(file)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(**options, rounds=args.rounds, device=args.device)
    result["command"] = shlex.join([command_name(), *args.argv])
    print(f"{tables.settings_line(result)}\n")
    for line in getattr(tables, f"{kind}_lines")(result):
        print(line)
    for file in files:
        write_json(file, result)
    if args.output:
        picture = files[-1].with_suffix(".png")
        getattr(plots, f"plot_{kind}")(result, picture)
        print(f"written: {picture}")


def _split(text: str, option: str) -> list[str]:
    """The distinct parts of a list separated by commas; ValueError if there are none."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ValueError(f"{option} needs a value, or several separated by commas, got {text!r}")
    return parts


def _whole_numbers(text: str, option: str) -> list[int]:
    parts = _split(text, option)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be whole numbers from 1, separated by commas, got {text!r}")
    return [int(part) for part in parts]
