"""How long networks take for an image: by runtime, precision, image size and batch size, next to a peer.

Shapes: B batch, H x W image.
"""

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

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
"""Seconds of a turn, at least."""
RUNTIME_OF = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch.export"}
"""What exported files run in, by their format."""


@dataclass
class Entry:
    """A network, ready to run in one runtime and precision at one size; ``row`` is what is reported of it."""

    row: dict[str, Any]
    run: Run

    @property
    def name(self) -> str:
        """What tells it from the others of that size."""
        return name_of(self.row["model"], self.row["runtime"], self.row["precision"])


def name_of(model: str, runtime: str, precision: str) -> str:
    """The `Entry.name` of a model there."""
    return f"{model} {runtime} {precision}"


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
    """The time of a forward pass of each of ``models`` next to ``peer``, in every combination of the other arguments.

    All networks, runtimes and precisions take turns of `TURN` seconds or more at an image size and a batch size. They
    are measured in their inference form (`qtvit.bench.candidates.inference_form`); one that a runtime cannot take is
    left out, and listed with the reason.

    Args:
        models: as `qtvit.bench.candidates.Candidate.parse` takes them. Exported files run in the runtime, precision
            and image size they were exported for.
        peer: the model that the ratios are to, at the same runtime, precision, image size and batch size; if it is an
            exported file, whatever the others' runtime and precision.
        runtimes: names in `qtvit.bench.runtimes.RUNTIMES`.
        precisions: names in `qtvit.bench.runtimes.DTYPES`.
        img_sizes: (H, W) of the images.
        batch_sizes: images per forward pass.
        rounds: turns that count.
        device: see `qtvit.device.resolve_device`.
        memory: measure the peak memory as well.
        peak: measure this machine's matrix products as well, and report which part of that speed the networks reach.

    Returns:
        "settings", "environment", "matmul_peaks" by precision, "rows", each with "seconds" of all rounds and what they
        come to, and "failed".

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: a model, runtime, precision, size or device that there is
            not, or all networks failed.
    """
    check_counts(rounds=rounds, **{"batch size": min(batch_sizes, default=0)})
    where = resolve_device(device)
    check_runtimes(runtimes, precisions, where)
    candidates = [Candidate.parse(name) for name in dict.fromkeys([*models, peer])]
    for candidate in candidates:
        if not candidate.exported:
            for img_size in img_sizes:
                check_img_size(candidate.module, img_size)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    peaks: dict[str, Any] = {}
    ways = [(runtime, precision) for runtime in runtimes for precision in precisions]
    # those that are compared take their turns one after the other
    pairs: list[tuple[Candidate, tuple[str, str] | None]]
    pairs = [(c, way) for way in ways for c in candidates if not c.exported]
    pairs += [(c, None) for c in candidates if c.exported]
    with plain_fp32():
        for img_size, batch_size in itertools.product(img_sizes, batch_sizes):
            images = example_images(batch_size, img_size, where)
            with TemporaryDirectory(prefix="qtvit-bench-") as folder:
                entries = [
                    prepare(candidate, way, images, folder, failed, memory)
                    for candidate, way in progress(pairs, desc="Preparing", unit="network")
                ]
                ready = [entry for entry in entries if entry]
                for precision in dict.fromkeys(entry.row["precision"] for entry in ready if peak):
                    if precision not in peaks:
                        peaks[precision] = matmul_peaks(runtimes, precision, where)
                rows += measure(ready, peer, where, rounds, peaks)
    if not rows:
        raise ValueError(f"nothing could be measured: {failed[0]['reason']}")
    return {
        "settings": {
            "peer": peer,
            "runtimes": list(runtimes),
            "precisions": list(precisions),
            "img_sizes": [list(size) for size in img_sizes],
            "batch_sizes": list(batch_sizes),
            "rounds": rounds,
        },
        "environment": environment(where),
        "matmul_peaks": peaks,
        "rows": rows,
        "failed": failed,
    }


def example_images(batch_size: int, img_size: tuple[int, int], device: torch.device) -> Tensor:
    """(B, 3, H, W) of noise, the same each time."""
    return torch.randn(batch_size, 3, *img_size, generator=torch.Generator().manual_seed(0)).to(device)


def prepare(
    candidate: Candidate,
    way: tuple[str, str] | None,
    images: Tensor,
    folder: str,
    failed: list[dict[str, Any]],
    memory: bool = False,
) -> Entry | None:
    """``candidate`` in the runtime and precision of ``way``, or in its own if it is an exported file.

    None if it cannot run there: then the reason is said, and added to ``failed``. Files are left in ``folder``.
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
    except Exception as error:  # whatever exporters, compilers and runtimes raise about what they cannot take
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        failed.append({**row, "reason": reason})
        say(f"left out: {' '.join(filter(None, (candidate.name, runtime, precision)))}: {reason}")
        return None


def _open(candidate: Candidate, row: dict[str, Any], images: Tensor, path: Path, memory: bool) -> Entry:
    """The network in the runtime and precision of the row."""
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
    """A file that `qtvit export` wrote, in the one runtime and precision it is for."""
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
    """The rows of ``entries``, with the times they took in turns and what these come to."""
    seconds = in_turns({e.name: e.run for e in entries}, device=device, rounds=rounds, min_seconds=TURN)
    exported_peer = [e.name for e in entries if e.row["model"] == peer and e.row["form"] == "exported"]
    for entry in entries:
        row, samples = entry.row, seconds[entry.name]
        peer_name = exported_peer[0] if exported_peer else name_of(peer, row["runtime"], row["precision"])
        median = statistics.median(samples)
        row["seconds"] = samples
        row["median_seconds"] = median
        row["images_per_second"] = row["batch_size"] / median
        row["ratio"] = ratio_to(seconds.get(peer_name), samples)
        row["gflops"] = 2e-9 * row["num_macs"] * row["batch_size"] / median
        found = peaks.get(row["precision"])
        row["peak_fraction"] = found and row["gflops"] / found["gflops"]
    return [entry.row for entry in entries]
