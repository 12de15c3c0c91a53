"""How all benchmarks measure: in turns, many times, against a peer."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from qtvit.console import progress
from qtvit.version import __version__

Samples = dict[str, list[float]]


def in_turns(
    candidates: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int, warmup: int = 2
) -> Samples:
    """Seconds of each candidate in each of ``rounds``, after ``warmup`` rounds that do not count.

    All run once before any runs again, so that what else the machine does hits all of them.
    """
    samples: Samples = {name: [] for name in candidates}
    for number in progress(range(warmup + rounds), desc="Measuring", unit="round"):
        for name, run in candidates.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if number >= warmup:
                samples[name].append(time.perf_counter() - start)
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


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on: versions, machine, threads."""
    return {
        "qtvit": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
