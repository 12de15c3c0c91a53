"""Time of a forward pass by runtime, precision, image size and batch size, next to a peer.

Shapes: B batch, H x W image.
"""

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtvit.checkpoints import own_args
from qtvit.console import progress, say
from qtvit.deploy.runtimes import open_exported
from qtvit.device import resolve_device
from qtvit.models import build_model, check_img_size, model_cost

from .candidates import Candidate
from .measure import check_counts, environment, in_turns, plain_fp32, ratio_to
from .memory import peak_cuda_memory, peak_memory
from .peak import matmul_peaks
from .runtimes import RUNTIMES, Run, check_runtimes

TURN = 0.05
"""Minimum length of a candidate's turn, in seconds."""
RUNTIME_OF = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch.export"}
"""Runtime of an exported file by its format."""


class Entry(NamedTuple):
    """A network opened in one runtime and precision at one size; ``row`` is its row of the report."""

    row: dict[str, Any]
    run: Run


def bench_latency(
    models: Sequence[str],
    peer: str = "efficientvit_b1",
    *,
    runtimes: Sequence[str] = ("eager",),
    precisions: Sequence[str] = ("fp32",),
    img_sizes: Sequence[tuple[int, int]] = ((224, 224),),
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 20,
    device: str = "auto",
    memory: bool = False,
    peak: bool = True,
) -> dict[str, Any]:
    """Time a forward pass of ``models`` and ``peer`` in every combination of the other arguments.

    At each image size and batch size, all networks, runtimes and precisions take turns of at least `TURN` seconds. The
    networks are in their inference form (`qtvit.bench.candidates.inference_form`); one that a runtime cannot run is
    listed with the reason instead.

    Args:
        models: see `qtvit.bench.candidates.Candidate`. Exported files run in the runtime, precision and image size they
            were exported for.
        peer: what the others' times are divided by, at the same runtime, precision and sizes. An exported file is the
            peer of all runtimes and precisions.
        runtimes: names in `qtvit.bench.runtimes.RUNTIMES`.
        precisions: names in `qtvit.bench.runtimes.DTYPES`.
        img_sizes: (H, W) of the images.
        batch_sizes: images per forward pass.
        rounds: timed turns of each network.
        device: see `qtvit.device.resolve_device`.
        memory: also measure the peak memory.
        peak: also measure this machine's matrix products, and report the fraction of their speed that networks reach.

    Returns:
        "settings", "environment", "matmul_peaks" by precision, "rows" with the "seconds" of every round and values
        derived from them, and "failed".

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: a model, runtime, precision, size or device cannot be used,
            or no network could be measured.
    """
    check_counts(rounds=rounds, **{"batch size": min(batch_sizes, default=0)})
    where = resolve_device(device)
    check_runtimes(runtimes, precisions, where)
    candidates = [Candidate.parse(name) for name in dict.fromkeys([*models, peer])]
    networks = [candidate for candidate in candidates if not candidate.exported]
    for candidate, img_size in itertools.product(networks, img_sizes):
        check_img_size(candidate.module, img_size)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    peaks: dict[str, Any] = {}
    # In this order, networks that are compared take their turns one after the other.
    pairs: list[tuple[Candidate, tuple[str, str] | None]]
    pairs = [(c, way) for way in itertools.product(runtimes, precisions) for c in networks]
    pairs += [(c, None) for c in candidates if c.exported]
    with plain_fp32():
        for img_size, batch_size in itertools.product(img_sizes, batch_sizes):
            images = example_images(batch_size, img_size, where)
            with TemporaryDirectory(prefix="qtvit-bench-") as folder:
                prepared = (
                    prepare(candidate, way, images, folder, failed, memory)
                    for candidate, way in progress(pairs, desc="Preparing", unit="network")
                )
                ready = [entry for entry in prepared if entry]
                for precision in [entry.row["precision"] for entry in ready if peak]:
                    peaks[precision] = peaks.get(precision) or matmul_peaks(runtimes, precision, where)
                rows += measure(ready, peer, where, rounds, peaks)
    if not rows:
        raise ValueError(f"nothing could be measured: {failed[0]['reason']}")
    settings: dict[str, Any] = {"peer": peer, "runtimes": list(runtimes), "precisions": list(precisions)}
    settings |= {"img_sizes": [*map(list, img_sizes)], "batch_sizes": list(batch_sizes), "rounds": rounds}
    return {
        "settings": settings,
        "environment": environment(where),
        "matmul_peaks": peaks,
        "rows": rows,
        "failed": failed,
    }


def example_images(batch_size: int, img_size: tuple[int, int], device: torch.device) -> Tensor:
    """Noise (B, 3, H, W), the same at every call."""
    return torch.randn(batch_size, 3, *img_size, generator=torch.Generator().manual_seed(0)).to(device)


def prepare(
    candidate: Candidate,
    way: tuple[str, str] | None,
    images: Tensor,
    folder: str,
    failed: list[dict[str, Any]],
    memory: bool = False,
) -> Entry | None:
    """Open ``candidate`` in ``way``, a runtime and precision; None for an exported file, which has its own.

    Its files are written to ``folder``. Returns None if it cannot run there; the reason is printed and added to
    ``failed``.
    """
    runtime, precision = way or ("", "")
    row: dict[str, Any] = {
        "model": candidate.name,
        "form": candidate.form,
        "runtime": runtime,
        "precision": precision,
        "img_size": list(images.shape[-2:]),
        "batch_size": len(images),
    }
    try:
        if way is None:
            return _open_exported(candidate, row, images)
        path = Path(mkdtemp(dir=folder)) / f"model{RUNTIMES[runtime].suffix}"
        return _open(candidate, row, images, path, memory)
    except (OSError, ImportError):
        raise
    except Exception as error:  # exporters, compilers and runtimes raise all kinds about what they do not support
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        failed.append({**row, "reason": reason})
        say(f"left out: {' '.join(filter(None, (candidate.name, runtime, precision)))}: {reason}")
        return None


def _open(candidate: Candidate, row: dict[str, Any], images: Tensor, path: Path, memory: bool) -> Entry:
    """Open the network in the runtime and precision of ``row``, compare its output with PyTorch's, complete ``row``."""
    runtime, precision, img_size = row["runtime"], row["precision"], (images.shape[-2], images.shape[-1])
    eager_cpu = RUNTIMES[runtime].eager and precision == "fp32" and images.device.type == "cpu"
    form = candidate.measured(img_size, eager_cpu)
    RUNTIMES[runtime].save(form, images, path, precision)
    open_network = partial(RUNTIMES[runtime].open, path, images, precision)
    if memory and images.device.type == "cuda":
        run, row["peak_bytes"] = peak_cuda_memory(open_network, images.device)
    else:
        run = open_network()
    with torch.inference_mode():
        expected = copy.deepcopy(candidate.module).to(images.device)(images)
    difference = (run().float() - expected).abs().max() / expected.abs().max()
    if precision == "fp32" and not difference < 0.01:
        raise ValueError(f"its outputs differ by {difference:.1%} from PyTorch's")
    row["num_params"] = sum(p.numel() for p in candidate.module.parameters())
    row["num_macs"] = candidate.num_macs(form, img_size)
    row["output_error"] = difference.item() if difference.isfinite() else None
    if memory and images.device.type == "cpu":
        row["peak_bytes"] = peak_memory(path, runtime, precision, tuple(images.shape))
    return Entry(row, run)


def _open_exported(candidate: Candidate, row: dict[str, Any], images: Tensor) -> Entry:
    """Open a file that `qtvit export` wrote, in the runtime and precision it is for, and complete ``row``."""
    assert candidate.exported is not None
    network = open_exported(candidate.exported, str(images.device), torch.get_num_threads())
    row.update(runtime=RUNTIME_OF[network.artifact.format], precision=network.artifact.precision, form="exported")
    with torch.device("meta"):
        info = network.artifact.info
        cost = model_cost(build_model(info.model, **own_args(info.model_args)), (images.shape[-2], images.shape[-1]))
    row.update(num_params=cost.num_params, num_macs=cost.num_macs, output_error=None)
    network(images)
    return Entry(row, lambda: network(images))


def measure(
    entries: Sequence[Entry], peer: str, device: torch.device, rounds: int, peaks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Time ``entries`` in turns, and return their rows with the times, ratios to ``peer`` and speeds."""
    rows = [entry.row for entry in entries]
    runs = {(e.row["model"], e.row["runtime"], e.row["precision"]): e.run for e in entries}
    seconds = in_turns(runs, device=device, rounds=rounds, min_seconds=TURN)
    peers = [key for key, row in zip(runs, rows, strict=True) if row["model"] == peer and row["form"] == "exported"]
    for (model, runtime, precision), row in zip(runs, rows, strict=True):
        samples = seconds[model, runtime, precision]
        median = statistics.median(samples)
        row["seconds"] = samples
        row["median_seconds"] = median
        row["images_per_second"] = row["batch_size"] / median
        row["ratio"] = ratio_to(seconds.get(peers[0] if peers else (peer, runtime, precision)), samples)
        row["gflops"] = 2e-9 * row["num_macs"] * row["batch_size"] / median
        row["peak_fraction"] = row["gflops"] / peaks[precision]["gflops"] if precision in peaks else None
    return rows
