"""How fast this machine multiplies matrices, as an upper bound of the speed of networks."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qtvit.console import progress

from .measure import synchronize
from .runtimes import RUNTIMES, Run

CPU_SIZES = (256, 512, 1024, 2048)
GPU_SIZES = (1024, 2048, 4096, 8192)
"""Sides of the square matrices to try."""
MULTIPLIERS = ("eager", "onnxruntime", "openvino")
"""Runtimes with matrix products of their own; the others use PyTorch's, as eager does."""


class _Product(nn.Module):
    """Multiplies each of three matrices (1, 3, N, N) with a weight (N, N)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(side, side, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def matmul_peaks(
    runtimes: Sequence[str], precision: str, device: torch.device, sizes: Sequence[int] | None = None
) -> dict[str, Any]:
    """The fastest product of two square matrices in ``precision``, over all sizes, with PyTorch and ``runtimes``.

    For "int8", the precision of some exported files, only PyTorch's ``torch._int_mm`` is measured.

    Returns:
        "gflops": 10⁹ operations per second, two per multiply-accumulate; the "runtime" and "size" that reached it; and
        "all" results, as {runtime: {size: gflops}}.
    """
    names = [n for n in MULTIPLIERS if n == "eager" or (n in runtimes and precision in RUNTIMES[n].precisions)]
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    sizes = sizes or (CPU_SIZES if device.type == "cpu" else GPU_SIZES)
    pairs = [(name, side) for name in names for side in sizes]
    with TemporaryDirectory() as folder:
        for name, side in progress(pairs, desc=f"Measuring matrix products in {precision}", unit="size"):
            if min(found[name].values(), default=1.0) < 1:
                continue  # the device lacks instructions for this precision, and larger sizes would take minutes
            run = _products(name, precision, side, device, Path(folder))
            found[name][side] = 3 * 2e-9 * side**3 / _fastest(run, device)
    gflops, runtime_name, side = max((value, name, side) for name in found for side, value in found[name].items())
    return {"gflops": gflops, "runtime": runtime_name, "size": side, "all": found}


def _products(name: str, precision: str, side: int, device: torch.device, folder: Path) -> Run:
    """What runs `_Product` on random matrices in the runtime ``name`` and ``precision``."""
    if precision == "int8":
        a, b = (torch.randint(-128, 128, (rows, side), dtype=torch.int8, device=device) for rows in (3 * side, side))
        return partial(torch._int_mm, a, b)
    runtime = RUNTIMES[name]
    path = folder / f"{name}{side}{runtime.suffix}"
    x = torch.randn(1, 3, side, side, device=device)
    runtime.save(_Product(side), x, path, precision)
    return runtime.open(path, x, precision)


def _fastest(run: Run, device: torch.device, min_seconds: float = 0.3, min_calls: int = 3) -> float:
    """Seconds of the quickest call within ``min_seconds``, after one that does not count."""
    best, calls, begin = float("inf"), -1, time.perf_counter()
    while calls < min_calls or time.perf_counter() - begin < min_seconds:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        calls += 1
        best = min(best, time.perf_counter() - start) if calls else best
    return best
