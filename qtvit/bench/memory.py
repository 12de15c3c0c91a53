"""Peak memory of running a network, measured in a process of its own."""

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
"""Runtimes that compile in the process that runs the network; the memory of compiling hides that of running."""


def peak_memory(path: Path, runtime: str, precision: str, shape: tuple[int, ...]) -> int | None:
    """Peak bytes, weights included, of opening a file of `qtvit.bench.runtimes` and running it on images of ``shape``.

    That is the growth of a process after it has imported all packages. None where it cannot be measured: for
    `COMPILERS`, and on systems other than Linux.

    Raises:
        ValueError: the process failed.
    """
    if runtime in COMPILERS or not _largest():
        return None
    given = json.dumps([str(path), runtime, precision, shape, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-m", "qtvit.bench.memory", given], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "killed").splitlines()[-1]
        raise ValueError(f"memory of {runtime} cannot be measured: {reason}")
    return int(done.stdout.split()[-1])


def peak_cuda_memory(open_network: Callable[[], Run], device: torch.device) -> tuple[Run, int]:
    """What ``open_network`` returns, and the peak bytes that running it takes on the GPU, weights included."""
    before = torch.cuda.memory_allocated(device)
    run = open_network()
    run()  # the first run takes more, for compilers and libraries
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return run, torch.cuda.max_memory_allocated(device) - before


def _largest() -> int:
    """Peak resident bytes of this process (Linux's VmHWM); 0 on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0].split()[1]) if found else 0


def _measure(path: str, runtime: str, precision: str, shape: list[int], threads: int) -> int:
    torch.set_num_threads(threads)
    for package in RUNTIMES[runtime].packages[-1:]:  # the last one runs the network, others convert it
        importlib.import_module(package)
    images = torch.randn(shape)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _largest()
    run = RUNTIMES[runtime].open(Path(path), images, precision)
    for _ in range(3):
        run()
    return _largest() - before


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
