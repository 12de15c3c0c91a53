"""How all benchmarks measure: in turns, many times, against a peer."""

import contextlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

from qtvit.console import progress
from qtvit.version import __version__

Key = TypeVar("Key", bound=Hashable)

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")
"""What a CPU may have, as Linux calls it, that decides which precisions are fast."""
OTHER_PACKAGES = ("onnxruntime", "openvino")
"""Packages that measure beside PyTorch and timm, where they are installed."""


def in_turns(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    min_seconds: float = 0.0,
) -> dict[Key, list[float]]:
    """Seconds of each candidate in each of ``rounds``, after ``warmup`` rounds that do not count.

    All take their turn before any has another, so that what else the machine does hits all of them. Every other round
    goes backwards, so that it does not matter who comes after whom.

    Args:
        candidates: what to run, by name.
        device: whose work a turn waits for.
        rounds: turns of each that count.
        warmup: turns of each that do not.
        min_seconds: of a turn. With it, a candidate that is quicker runs several times in a turn, once more before the
            clock starts, so that the caches hold its data and not the last one's, and the sample is the mean.
    """
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    for number in progress(range(warmup + rounds), desc="Measuring", unit="round"):
        order = list(candidates.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            if calls[name] > 1:
                run()
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            _synchronize(device)
            seconds = (time.perf_counter() - start) / calls[name]
            if number >= warmup:
                samples[name].append(seconds)
            else:
                calls[name] = max(math.ceil(min_seconds / seconds), 1)
    return samples


@dataclass(frozen=True)
class Ratio:
    """Of two candidates' times, taken round by round: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float


def paired_ratio(ours: list[float], peers: list[float]) -> Ratio:
    """ours / peers by round; needs two rounds or more."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, peers, strict=True)], method="inclusive")
    return Ratio(median, low, high)


def ratio_to(peers: list[float] | None, ours: list[float]) -> dict[str, float] | None:
    """`paired_ratio` for a result that is written as JSON; None if there is no peer."""
    return None if peers is None else asdict(paired_ratio(ours, peers))


def check_counts(**counts: int) -> None:
    """ValueError unless there are two ``rounds``, and one or more of all else."""
    for name, count in counts.items():
        least = 2 if name == "rounds" else 1
        if count < least:
            words = "needs two rounds or more" if name == "rounds" else f"needs {name} of 1 or more"
            raise ValueError(f"a comparison {words}, got {count}")


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of seconds = c·sizes^p, least squares over logarithms; needs two different sizes."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in seconds]
    return statistics.linear_regression(x, y).slope


@contextlib.contextmanager
def plain_fp32() -> Iterator[None]:
    """Within this context fp32 on a GPU is fp32: convolutions use TF32 by default, matrix products do not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: versions, machine, threads."""
    found = {}
    for package in OTHER_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {
        "qtvit": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        **found,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_info("model name") or platform.machine(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_info("flags").split()],
        "threads": torch.get_num_threads(),
    }


def _cpu_info(name: str) -> str:
    """The first line of that name in Linux's description of the CPU; empty if there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
