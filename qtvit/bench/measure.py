"""How all benchmarks measure: candidates take turns, many times, and are compared with a peer round by round."""

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
"""CPU features, by their names in Linux, that decide which precisions are fast."""
OTHER_PACKAGES = ("onnxruntime", "openvino")
"""Optional packages whose versions matter where they are installed."""


def in_turns(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    min_seconds: float = 0.0,
) -> dict[Key, list[float]]:
    """Seconds of each candidate in each of ``rounds``, after ``warmup`` rounds that do not count.

    In a round every candidate has one turn, so that other load on the machine hits all of them. Every other round goes
    backwards, so that the order does not matter.

    Args:
        candidates: what to run, by name.
        device: device whose work has to be done before the clock starts and stops.
        min_seconds: minimum length of a turn. A quicker candidate runs several times in it, and the sample is the mean;
            it also runs once before the clock starts, so that the caches hold its data and not the last candidate's.
    """
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    for number in progress(range(warmup + rounds), desc="Measuring", unit="round"):
        order = list(candidates.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            if calls[name] > 1:
                run()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronize(device)
            seconds = (time.perf_counter() - start) / calls[name]
            if number >= warmup:
                samples[name].append(seconds)
            else:
                calls[name] = max(math.ceil(min_seconds / seconds), 1)
    return samples


@dataclass(frozen=True)
class Ratio:
    """Ratio of two candidates' times within each round: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float


def paired_ratio(ours: list[float], peers: list[float]) -> Ratio:
    """The ratio ours / peers of times in the same rounds; needs two rounds or more."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, peers, strict=True)], method="inclusive")
    return Ratio(median, low, high)


def ratio_to(peers: list[float] | None, ours: list[float]) -> dict[str, float] | None:
    """`paired_ratio` as a dict for JSON; None if the peer has no times."""
    return None if peers is None else asdict(paired_ratio(ours, peers))


def check_counts(**counts: int) -> None:
    """Raise ValueError unless ``rounds`` is 2 or more and every other count is 1 or more."""
    for name, count in counts.items():
        least = 2 if name == "rounds" else 1
        if count < least:
            words = "needs two rounds or more" if name == "rounds" else f"needs {name} of 1 or more"
            raise ValueError(f"a comparison {words}, got {count}")


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of seconds = c·sizes^p, by least squares on logarithms; needs two different sizes."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


@contextlib.contextmanager
def plain_fp32() -> Iterator[None]:
    """Within this context, fp32 on a GPU is not TF32, which PyTorch uses for convolutions by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def environment(device: torch.device) -> dict[str, Any]:
    """What the measured times depend on: versions, machine, number of threads."""
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
    """The first value of ``name`` in Linux's /proc/cpuinfo; "" if there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its work; the CPU has when a call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
