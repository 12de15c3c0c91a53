"""How time grows: of attention alone with the number of tokens, and of whole networks with the number of pixels.

Shapes: B batch, D channels per head, N tokens; H x W image.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qtvit.console import progress, quiet, say
from qtvit.device import resolve_device
from qtvit.errors import unknown_name
from qtvit.layers import MultiScaleAttention
from qtvit.models import ARCHITECTURES, check_img_size
from qtvit.ops import get_kernel, linear_attention_cf

from .candidates import Candidate
from .latency import TURN, example_images, prepare
from .measure import check_counts, environment, in_turns, plain_fp32, power_law, ratio_to
from .runtimes import Run, check_runtimes

SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
STRIDES = (16, 32)
"""Strides of the stages with attention; their map sizes give the numbers of tokens to measure."""
MIN_POINTS = 3
"""Minimum number of sizes to fit an exponent to. Only the larger sizes count: at small ones, overhead dominates."""


def bench_scaling(
    model: str = "qtvit_1",
    peer: str = "efficientvit_b1",
    *,
    kernels: Sequence[str] = ("taylor2", "softmax", "relu"),
    sizes: Sequence[int] = SIZES,
    head_dims: Sequence[int] = (16, 32),
    attention: bool = True,
    network: bool = True,
    runtime: str = "eager",
    batch_size: int = 1,
    rounds: int = 10,
    max_seconds: float = 5.0,
    device: str = "auto",
) -> dict[str, Any]:
    """Time attention alone and whole networks with each of ``kernels``, in fp32, at growing sizes, in turns.

    Softmax attention alone is PyTorch's ``scaled_dot_product_attention``, on tensors in the layout that suits it.

    Args:
        model: a network of ours, measured with each kernel.
        peer: another network to measure beside it.
        kernels: names in ``qtvit.ops.KERNELS``; the first one is compared with the others.
        sizes: sides of square images. Attention alone gets the numbers of tokens that maps of `STRIDES` have there.
        head_dims: D of attention alone; `heads_by_dim` gives the number of heads.
        attention, network: whether to measure attention alone, and whole networks.
        runtime: runtime of the networks, a name in `qtvit.bench.runtimes.RUNTIMES`.
        batch_size: images per forward pass.
        rounds: timed turns at each size.
        max_seconds: what takes longer for one run is not measured at larger sizes.
        device: see `qtvit.device.resolve_device`.

    Returns:
        "settings", "environment", "curves": for every kernel or network its "sizes" (tokens or pixels), the "seconds"
        of all rounds at each, medians and the exponent of their growth; "crossovers": the sizes from which the first
        kernel is faster than each of the others; and "failed".

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: a kernel, model, size, runtime or device cannot be used.
    """
    check_counts(rounds=rounds, **{"batch size": batch_size})
    where = resolve_device(device)
    check_runtimes([runtime], ["fp32"], where)
    sizes = sorted(set(sizes))
    if len(sizes) < 2:
        raise ValueError(f"growth takes two image sizes or more, got {sizes}")
    for kernel in kernels:
        get_kernel(kernel)
    for dim in head_dims:
        if dim not in heads_by_dim():
            raise unknown_name("head dimension", str(dim), map(str, heads_by_dim()))
    names = [*(f"{model}:{kernel}" for kernel in kernels), peer]
    candidates = {name: Candidate.parse(name) for name in names}
    for candidate in candidates.values() if network else ():
        check_img_size(candidate.module, (sizes[0], sizes[0]), "--sizes")
    curves: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with plain_fp32():
        if attention:
            tokens = sorted({math.ceil(size / stride) ** 2 for size in sizes for stride in STRIDES})
            for dim in head_dims:

                def make(tokens: int, left: Sequence[str], folder: str, dim: int = dim) -> dict[str, Run]:
                    return attention_runs(left, (batch_size, heads_by_dim()[dim], dim, tokens), where)

                curves += _grow(f"attention, D = {dim}", "tokens", tokens, kernels, make, where, rounds, max_seconds)
        if network:

            def load(pixels: int, left: Sequence[str], folder: str) -> dict[str, Run]:
                images = example_images(batch_size, (math.isqrt(pixels), math.isqrt(pixels)), where)
                way = (runtime, "fp32")
                entries = {n: prepare(candidates[n], way, images, folder, failed) for n in left}
                return {name: entry.run for name, entry in entries.items() if entry}

            pixels = [size**2 for size in sizes]
            curves += _grow(f"network, {runtime}", "pixels", pixels, names, load, where, rounds, max_seconds)
    settings: dict[str, Any] = {"model": model, "peer": peer, "kernels": list(kernels), "sizes": list(sizes)}
    settings["head_dims"] = {dim: f"{heads_by_dim()[dim]} heads" for dim in head_dims}
    settings |= {"runtime": runtime, "batch_size": batch_size, "rounds": rounds, "max_seconds": max_seconds}
    return {
        "settings": settings,
        "environment": environment(where),
        "curves": curves,
        "crossovers": _crossovers(curves),
        "failed": failed,
    }


def heads_by_dim() -> dict[int, int]:
    """Heads of attention alone by D: those of both scales in the last stage of the smallest network with that D."""
    stages = {cfg.head_dim: cfg.stages[-1].width for cfg in (ARCHITECTURES["qtvit_2"], ARCHITECTURES["qtvit_1"])}
    return {dim: MultiScaleAttention.num_scales * width // dim for dim, width in sorted(stages.items())}


@torch.inference_mode()
def attention_runs(kernels: Sequence[str], shape: tuple[int, ...], device: torch.device) -> dict[str, Run]:
    """For each kernel, a function that runs attention on random q, k and v of ``shape`` (B, heads, D, N)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    runs: dict[str, Run] = {kernel: partial(linear_attention_cf, q, k, v, kernel) for kernel in kernels}
    if "softmax" in runs:
        tokens_first = (q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous())
        runs["softmax"] = partial(scaled_dot_product_attention, *tokens_first)
    return {kernel: torch.inference_mode()(run) for kernel, run in runs.items()}


def _grow(
    part: str,
    unit: str,
    sizes: Sequence[int],
    names: Sequence[str],
    make: Callable[[int, Sequence[str], str], dict[str, Run]],
    device: torch.device,
    rounds: int,
    max_seconds: float,
) -> list[dict[str, Any]]:
    """Time ``names`` at all ``sizes`` in turns; returns a curve for each.

    ``make`` takes a size, names and a folder for files, and returns what to run for each name that can run there.
    """
    left = list(names)
    runs: dict[tuple[str, int], Run] = {}
    with TemporaryDirectory(prefix="qtvit-bench-") as folder:
        for size in progress(sizes, desc=f"Preparing {part}", unit="size"):
            made = make(size, left, folder)
            left = []
            for name, run in made.items():
                runs[name, size] = run
                with quiet():
                    once = in_turns({name: run}, device=device, rounds=1, warmup=1)[name][0]
                if once <= max_seconds:
                    left.append(name)
                elif size != sizes[-1]:
                    say(f"left out: {name} at more than {size:,} {unit}, which take {once:.1f} s")
        samples = in_turns(runs, device=device, rounds=rounds, min_seconds=TURN)
    found = {name: {size: samples[name, size] for size in sizes if (name, size) in samples} for name in names}
    curves = []
    for name, by_size in found.items():
        measured, seconds = list(by_size), list(by_size.values())
        medians = [statistics.median(samples) for samples in seconds]
        growth = [(time / medians[0]) / (size / measured[0]) for size, time in zip(measured, medians, strict=True)]
        ratios = [ratio_to(found[names[0]].get(size), samples) for size, samples in by_size.items()]
        curve: dict[str, Any] = {"part": part, "unit": unit, "name": name, "sizes": measured, "seconds": seconds}
        curve |= {"median_seconds": medians, "exponent": fit_exponent(measured, medians)}
        curves.append(curve | {"relative_growth": growth, "ratio": ratios})
    return curves


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The p of seconds = c·size^p over the larger half of the sizes, at least `MIN_POINTS`; None for a single size."""
    count = max(-(-len(sizes) // 2), MIN_POINTS)
    return power_law(sizes[-count:], seconds[-count:]) if len(sizes) > 1 else None


def find_crossover(sizes: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The size from which ``ratios`` (another's time / ours) stay above 1, interpolated on logarithmic axes.

    None if all of them are above 1, or the last one is not.
    """
    for index in reversed(range(len(sizes) - 1)):
        low, high = math.log(ratios[index]), math.log(ratios[index + 1])
        if high <= 0:
            return None
        if low <= 0:
            part = -low / (high - low)
            return math.exp((1 - part) * math.log(sizes[index]) + part * math.log(sizes[index + 1]))
    return None


def _crossovers(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The size from which the first curve of each part stays below each other curve of that part."""
    found = []
    first = {curve["part"]: curve["name"] for curve in reversed(curves)}
    for curve in curves:
        part, name = curve["part"], curve["name"]
        both = [(size, r["median"]) for size, r in zip(curve["sizes"], curve["ratio"], strict=True) if r]
        if name != first[part] and both:
            sizes, ratios = zip(*both, strict=True)
            at = find_crossover(sizes, ratios)
            wins = "never" if ratios[-1] <= 1 else "always" if at is None else "from"
            found.append({"part": part, "faster": first[part], "than": name, "wins": wins, "at": at})
    return found
