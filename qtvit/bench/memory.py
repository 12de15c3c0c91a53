"""The memory that running a network takes, measured in a process of its own."""

import contextlib
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .runtimes import RUNTIMES, Run

COMPILERS = ("compile", "compile_frozen")
"""Runtimes that compile in the process that runs: what they take to compile hides what running takes."""


def peak_memory(path: Path, runtime: str, precision: str, shape: tuple[int, ...]) -> int | None:
    """Bytes by which opening a file of `qtvit.bench.runtimes` and running it on images of ``shape`` makes a process
    grow at the most, weights included, after all packages are imported. None where it cannot be told: for runtimes
    that compile, and on systems that do not say how large a process has been.

    Raises:
        ValueError: the process failed.
    """
    if runtime in COMPILERS or _largest() is None:
        return None
    given = json.dumps([str(path), runtime, precision, shape, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-m", "qtvit.bench.memory", given], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "killed"
        raise ValueError(f"memory of {runtime} cannot be measured: {reason.splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def peak_cuda_memory(open_network: Callable[[], Run], device: torch.device) -> tuple[Run, int]:
    """What ``open_network`` gives, and the bytes of the GPU that it needs at the most to run, weights included."""
    before = torch.cuda.memory_allocated(device)
    run = open_network()
    run()  # compilers and libraries take more the first time
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return run, torch.cuda.max_memory_allocated(device) - before


def _largest() -> int | None:
    """Bytes that this process has had in memory at the most; None if the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0].split()[1]) if found else None


def _measure(path: str, runtime: str, precision: str, shape: list[int], threads: int) -> int:
    torch.set_num_threads(threads)
    for package in RUNTIMES[runtime].packages[-1:]:  # the last one runs, others convert
        importlib.import_module(package)
    images = torch.randn(shape)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM counts anew
    before = _largest()
    run = RUNTIMES[runtime].open(Path(path), images, precision)
    for _ in range(3):
        run()
    after = _largest()
    assert before is not None
    assert after is not None
    return after - before


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
