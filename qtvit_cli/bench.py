"""Measuring models side by side: ``qtvit bench``."""

import argparse
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .common import Commands, command_name, make_parent, new_file, positive, write_json

MODELS = (
    "names, ours or timm's, run folders, model files; qtvit_1:softmax has another kernel, plain:qtvit_1 nothing fused, "
    "released:qtvit_1 its attention written as in the authors' code"
)
RUNTIMES = "eager, channels_last, compile, compile_frozen, onnxruntime, openvino"


def add_bench(commands: Commands) -> None:
    """Add what ``qtvit bench`` can measure."""
    bench = commands.add_parser("bench", help="measure models side by side")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    _add_latency(kinds)
    _add_scaling(kinds)
    _add_pareto(kinds)
    _add_train(kinds)
    _add_loader(kinds)


def _add_latency(kinds: Commands) -> None:
    latency = kinds.add_parser(
        "latency",
        help="time of a forward pass by runtime, precision, image size and batch size",
        description="Times models next to a peer, each in its inference form, in turns. Options that are lists are "
        "separated by commas; all their combinations are measured.",
    )
    latency.add_argument("models", nargs="*", default=["qtvit_1"], help=f"{MODELS}; or exported files (qtvit_1)")
    latency.add_argument("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    latency.add_argument("--runtime", default="eager", metavar="LIST", help=f"of {RUNTIMES} (default: eager)")
    latency.add_argument("--precision", default="fp32", metavar="LIST", help="of fp32, bf16, fp16 (default: fp32)")
    latency.add_argument("--img-size", default="224", metavar="LIST", help="of sides or HEIGHTxWIDTHs (default: 224)")
    latency.add_argument("--batch-size", default="1", metavar="LIST", help="of images per forward pass (default: 1)")
    latency.add_argument("--memory", action="store_true", help="also measure peak memory, in a process for each")
    latency.add_argument("--no-peak", action="store_true", help="do not measure matrix products to compare with")
    _add_common(latency, rounds=20)
    latency.set_defaults(command=bench_latency)


def _add_scaling(kinds: Commands) -> None:
    scaling = kinds.add_parser(
        "scaling",
        help="how time grows with the image, for linear attention and softmax",
        description="Times attention alone with several kernels at growing numbers of tokens, and networks with these "
        "kernels at growing image sizes, in fp32; fits exponents, and says from where on the first kernel is faster.",
    )
    scaling.add_argument("--model", default="qtvit_1", help="one of ours (default: qtvit_1)")
    scaling.add_argument("--peer", default="efficientvit_b1", help="another network (default: efficientvit_b1)")
    scaling.add_argument("--kernel", default="taylor2,softmax,relu", metavar="LIST", help="default: %(default)s")
    scaling.add_argument(
        "--sizes", default="224,384,512,768,1024,1536,2048", metavar="LIST", help="default: %(default)s"
    )
    scaling.add_argument("--head-dim", default="16,32", metavar="LIST", help="channels per head (default: %(default)s)")
    part = scaling.add_mutually_exclusive_group()
    part.add_argument("--op-only", action="store_true", help="attention alone")
    part.add_argument("--model-only", action="store_true", help="whole networks alone")
    scaling.add_argument("--runtime", default="eager", help=f"of the networks: {RUNTIMES} (default: eager)")
    scaling.add_argument("--batch-size", type=positive, default=1)
    scaling.add_argument(
        "--max-seconds", type=float, default=5, metavar="S", help="measure nothing larger than what takes longer (5)"
    )
    _add_common(scaling, rounds=10)
    scaling.set_defaults(command=bench_scaling)


def _add_pareto(kinds: Commands) -> None:
    pareto = kinds.add_parser(
        "pareto",
        help="published accuracy against the latency measured here",
        description="Times models at the image size of their published ImageNet top-1 and says which are on the front: "
        "those that no other is both quicker and more accurate than.",
    )
    pareto.add_argument(
        "models", nargs="*", help="names, families or patterns such as 'efficientvit_b*' (default: all that are known)"
    )
    pareto.add_argument("--peer", default="efficientvit_b1", help="what all take turns with (default: efficientvit_b1)")
    pareto.add_argument("--runtime", default="eager", help=f"{RUNTIMES} (default: eager)")
    pareto.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (default: fp32)")
    pareto.add_argument("--batch-size", type=positive, default=1)
    _add_common(pareto, rounds=10)
    pareto.set_defaults(command=bench_pareto)


def _add_train(kinds: Commands) -> None:
    steps = kinds.add_parser("train", help="time of a training step, and memory kept for its backward pass")
    steps.add_argument(
        "models", nargs="*", default=["qtvit_1", "qtvit_1:softmax"], help=f"{MODELS} (qtvit_1 qtvit_1:softmax)"
    )
    steps.add_argument("--peer", default="efficientvit_b1", help="what to compare with (default: efficientvit_b1)")
    steps.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    steps.add_argument("--batch-size", type=positive, default=16)
    steps.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    steps.add_argument(
        "--recompute-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="as in training: less memory, more time (qtvit's models only)",
    )
    _add_common(steps, rounds=10)
    steps.set_defaults(command=bench_train)


def _add_loader(kinds: Commands) -> None:
    loader = kinds.add_parser("loader", help="images per second of the training loader, next to timm's")
    loader.add_argument("data", help="folder with train/CLASS/*.jpg, or CLASS/*.jpg alone")
    loader.add_argument("--img-size", default="224", help="side or HEIGHTxWIDTH (default: 224)")
    loader.add_argument("--batch-size", type=positive, default=128)
    loader.add_argument("--num-workers", type=int, help="processes that load images (default: one per core less one)")
    loader.add_argument("--batches", type=positive, default=8, help="batches of a turn (default: 8)")
    loader.add_argument("--auto-augment", default="rand-n1-m3-mstd1.0-inc1", help="default: %(default)s")
    _add_common(loader, rounds=10)
    loader.set_defaults(command=bench_loader)


def _add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Options that all benchmarks have."""
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"turns of each to time (default: {rounds})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: one per core)")
    parser.add_argument(
        "--output", type=new_file, metavar="NAME", help="write all samples to NAME.json and a picture to NAME.png"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all samples to FILE, without a picture")


def bench_latency(args: argparse.Namespace) -> None:
    """``qtvit bench latency``."""
    from qtvit.bench.latency import bench_latency as run
    from qtvit.bench.tables import latency_lines
    from qtvit.data.preprocess import parse_size

    report = _start(args, "plot_latency")
    result = run(
        args.models,
        args.peer,
        runtimes=_split(args.runtime, "--runtime"),
        precisions=_split(args.precision, "--precision"),
        img_sizes=[parse_size(part) for part in _split(args.img_size, "--img-size")],
        batch_sizes=_whole_numbers(args.batch_size, "--batch-size"),
        rounds=args.rounds,
        device=args.device,
        memory=args.memory,
        peak=not args.no_peak,
    )
    report(result, latency_lines(result))


def bench_scaling(args: argparse.Namespace) -> None:
    """``qtvit bench scaling``."""
    from qtvit.bench.scaling import bench_scaling as run
    from qtvit.bench.tables import scaling_lines

    report = _start(args, "plot_scaling")
    result = run(
        args.model,
        args.peer,
        kernels=_split(args.kernel, "--kernel"),
        sizes=_whole_numbers(args.sizes, "--sizes"),
        head_dims=_whole_numbers(args.head_dim, "--head-dim"),
        attention=not args.model_only,
        network=not args.op_only,
        runtime=args.runtime,
        batch_size=args.batch_size,
        rounds=args.rounds,
        max_seconds=args.max_seconds,
        device=args.device,
    )
    report(result, scaling_lines(result))


def bench_pareto(args: argparse.Namespace) -> None:
    """``qtvit bench pareto``."""
    from qtvit.bench.pareto import bench_pareto as run
    from qtvit.bench.tables import pareto_lines

    report = _start(args, "plot_pareto")
    result = run(
        args.models,
        args.peer,
        runtime=args.runtime,
        precision=args.precision,
        batch_size=args.batch_size,
        rounds=args.rounds,
        device=args.device,
    )
    report(result, pareto_lines(result))


def bench_train(args: argparse.Namespace) -> None:
    """``qtvit bench train``."""
    import torch

    from qtvit.bench.tables import train_lines
    from qtvit.bench.train import bench_training
    from qtvit.data.preprocess import parse_size

    report = _start(args, "plot_train")
    result = bench_training(
        args.models,
        args.peer,
        img_size=parse_size(args.img_size),
        batch_size=args.batch_size,
        rounds=args.rounds,
        device=args.device,
        autocast={"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(args.precision),
        recompute_activations=args.recompute_activations,
    )
    report(result, train_lines(result))


def bench_loader(args: argparse.Namespace) -> None:
    """``qtvit bench loader``."""
    from qtvit.bench.loader import bench_loader as run
    from qtvit.bench.tables import loader_lines
    from qtvit.data.preprocess import parse_size
    from qtvit.training.run import default_workers, set_threads

    report = _start(args, "plot_loader")
    num_workers = default_workers(in_memory=False) if args.num_workers is None else args.num_workers
    if num_workers < 0:
        raise ValueError(f"--num-workers must be 0 or more, got {num_workers}")
    set_threads(args.threads, num_workers)
    result = run(
        args.data,
        img_size=parse_size(args.img_size),
        batch_size=args.batch_size,
        num_workers=num_workers,
        batches=args.batches,
        rounds=args.rounds,
        auto_augment=args.auto_augment,
        device=args.device,
    )
    report(result, loader_lines(result))


def _start(args: argparse.Namespace, plot: str) -> Callable[[dict[str, Any], Iterable[str]], None]:
    """See that what is to be written can be, set the threads; returns what reports a result and its lines."""
    import torch

    files: list[Path] = [args.json] if args.json else []
    draw: Callable[[dict[str, Any], Path], None] | None = None
    if args.output:
        from qtvit.bench import plots

        draw = getattr(plots, plot)
        name = args.output.with_suffix("") if args.output.suffix in (".json", ".png") else args.output
        files.append(name.with_name(f"{name.name}.json"))
    for file in files:
        make_parent(file)
    if args.threads:
        torch.set_num_threads(args.threads)

    def report(result: dict[str, Any], lines: Iterable[str]) -> None:
        from qtvit.bench.tables import settings_line

        result["command"] = shlex.join([command_name(), *args.argv])
        print(f"{settings_line(result)}\n")
        for line in lines:
            print(line)
        for file in files:
            write_json(file, result)
        if draw:
            picture = files[-1].with_suffix(".png")
            draw(result, picture)
            print(f"written: {picture}")

    return report


def _split(text: str, option: str) -> list[str]:
    """What is in a list that is separated by commas, each once."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ValueError(f"{option} needs a value, or several separated by commas, got {text!r}")
    return parts


def _whole_numbers(text: str, option: str) -> list[int]:
    parts = _split(text, option)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} must be whole numbers from 1, separated by commas, got {text!r}")
    return [int(part) for part in parts]
