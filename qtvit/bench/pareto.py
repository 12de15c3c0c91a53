"""Published accuracy against the latency measured here, and the Pareto front of the two."""

import csv
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qtvit.console import progress
from qtvit.device import resolve_device
from qtvit.errors import unknown_name
from qtvit.models import PUBLISHED_ACCURACY, check_img_size

from .candidates import Candidate
from .latency import Entry, example_images, measure, prepare
from .measure import check_counts, environment, plain_fp32
from .runtimes import check_runtimes

PUBLISHED = Path(__file__).with_name("published_top1.csv")
OURS = "QT-ViT"
LARGE = ("qtvit_6",)
"""Models to leave out unless asked for: no other family in the table has any of comparable size."""
GROUP = 16
"""Number of networks in memory at a time, which take turns with the peer and each other."""


@dataclass(frozen=True)
class Published:
    """Published ImageNet-1k top-1 (in percent) of a model at an image size.

    ``model`` is the name for ``timm.create_model``, with the tag of the weights; ``family`` groups models.
    """

    family: str
    model: str
    img_size: int
    top1: float

    @property
    def label(self) -> str:
        """The model and its image size, for tables."""
        return f"{self.model.split('.')[0]} {self.img_size}"


def published_results() -> list[Published]:
    """The paper's results for our models, and timm's for those of others."""
    with PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    ours = [Published(OURS, model, 224, top1) for model, (top1, _) in PUBLISHED_ACCURACY.items()]
    return ours + [Published(r["family"], r["model"], int(r["img_size"]), float(r["top1"])) for r in rows]


def choose(patterns: Sequence[str]) -> list[Published]:
    """Published results whose model, architecture or family matches any of ``patterns``; without any, all but `LARGE`.

    Raises:
        ValueError: nothing matches a pattern.
    """
    results = published_results()
    if not patterns:
        return [each for each in results if each.model not in LARGE]
    names = {each: (each.model, each.model.split(".")[0], each.family) for each in results}
    chosen: dict[Published, None] = {}
    for pattern in patterns:
        found = [each for each in results if any(fnmatch(name, pattern) for name in names[each])]
        if not found:
            raise unknown_name("model with a published result", pattern, dict.fromkeys(sum(names.values(), ())))
        chosen |= dict.fromkeys(found)
    return list(chosen)


def bench_pareto(
    models: Sequence[str] = (),
    peer: str = "efficientvit_b1",
    *,
    runtime: str = "eager",
    precision: str = "fp32",
    batch_size: int = 1,
    rounds: int = 10,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the latency of models at the image size of their published top-1, and find the Pareto front.

    Models take turns in groups, and ``peer`` is in every group. A model's latency is its time divided by the peer's,
    round by round, times the peer's median over all groups, so that a machine that is slower for some time changes
    little. It may slow large models down more than a small peer; so models of similar accuracy, between which the front
    is decided, are in the same group.

    Args:
        models: names or patterns, see `choose`.
        peer: any model (`qtvit.bench.candidates.Candidate`); measured at 224 px.
        runtime, precision: names in `qtvit.bench.runtimes.RUNTIMES` and ``DTYPES``.
        batch_size: images per forward pass.
        rounds: timed turns of each model.
        device: see `qtvit.device.resolve_device`.

    Returns:
        "settings", "environment", "rows" by latency, each with "published_top1", "latency_seconds" of a forward pass,
        "on_front" and the samples; and "failed".

    Raises:
        ValueError, ModuleNotFoundError: an unknown model, runtime, precision or device, or the peer cannot be measured.
    """
    check_counts(rounds=rounds, **{"batch size": batch_size})
    where = resolve_device(device)
    check_runtimes([runtime], [precision], where)
    way = (runtime, precision)
    results = sorted(choose(models), key=lambda each: (each.top1, each.model))
    reference = Candidate.parse(peer)
    check_img_size(reference.module, (224, 224), "--peer")
    reference_images = example_images(batch_size, (224, 224), where)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    peer_seconds: list[float] = []
    groups = [results[start : start + GROUP] for start in range(0, len(results), GROUP)]
    with plain_fp32():
        for number, group in enumerate(groups, start=1):
            with TemporaryDirectory(prefix="qtvit-bench-") as folder:
                first = prepare(reference, way, reference_images, folder, failed)
                if first is None:
                    raise ValueError(f"the peer {peer} cannot be measured: {failed[0]['reason']}")
                entries: list[Entry] = []
                for each in progress(group, desc=f"Preparing {number} of {len(groups)}", unit="network"):
                    images = example_images(batch_size, (each.img_size, each.img_size), where)
                    entry = prepare(Candidate.parse(each.model), way, images, folder, failed)
                    if entry:
                        entry.row.update(family=each.family, label=each.label, published_top1=each.top1)
                        entry.row["model"] = f"{each.model} {each.img_size}"  # the same model may be there twice
                        entries.append(entry)
                measured = measure([first, *entries], peer, where, rounds, {})
                peer_seconds += measured[0]["seconds"]
                rows += measured[1:]
    if not rows:
        raise ValueError(f"nothing could be measured: {failed[0]['reason']}")
    for row in rows:
        row["latency_seconds"] = row["ratio"]["median"] * statistics.median(peer_seconds)
    rows.sort(key=lambda row: (row["latency_seconds"], -row["published_top1"]))
    for row, on_front in zip(rows, pareto_front([r["published_top1"] for r in rows]), strict=True):
        row["on_front"] = on_front
    settings = {"peer": peer, "runtime": runtime, "precision": precision, "batch_size": batch_size, "rounds": rounds}
    return {
        "settings": settings,
        "environment": environment(where),
        "peer_seconds": peer_seconds,
        "rows": rows,
        "failed": failed,
    }


def pareto_front(values: Sequence[float]) -> list[bool]:
    """For each of ``values``, in the order of their cost, whether it is larger than all before it."""
    best = itertools.accumulate([float("-inf"), *values], max)
    return [value > before for value, before in zip(values, best, strict=False)]
