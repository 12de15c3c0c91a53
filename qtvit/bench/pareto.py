"""Published accuracy against the latency that is measured here, and who is best at what latency."""

import csv
import itertools
import statistics
from collections.abc import Iterator, Sequence
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
"""Models that are left out unless they are asked for: nothing in the table of the others comes near their size."""
GROUP = 16
"""Networks that are in memory at a time, and take turns with the peer and with each other."""


@dataclass(frozen=True)
class Published:
    """Accuracy that somebody has published.

    Attributes:
        family: who the model belongs to.
        model: name for ``timm.create_model``, with the tag of the weights.
        img_size: side of the images it was evaluated on.
        top1: ImageNet-1k top-1 in percent.
    """

    family: str
    model: str
    img_size: int
    top1: float

    @property
    def label(self) -> str:
        """What to call it in a table: the model and its image size."""
        return f"{self.model.split('.')[0]} {self.img_size}"


def published_results() -> list[Published]:
    """The paper's results for our models, and timm's for those of others."""
    with PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    ours = [Published(OURS, model, 224, top1) for model, (top1, _) in PUBLISHED_ACCURACY.items()]
    return ours + [Published(r["family"], r["model"], int(r["img_size"]), float(r["top1"])) for r in rows]


def choose(patterns: Sequence[str]) -> list[Published]:
    """The results of models, architectures or families that match any of ``patterns``; all but `LARGE` without any.

    Raises:
        ValueError: a pattern that nothing matches.
    """
    results = published_results()
    if not patterns:
        return [each for each in results if each.model not in LARGE]
    chosen: list[Published] = []
    for pattern in patterns:
        names = {each: (each.model, each.model.split(".")[0], each.family) for each in results}
        found = [each for each in results if any(fnmatch(name, pattern) for name in names[each])]
        if not found:
            raise unknown_name("model with a published result", pattern, dict.fromkeys(sum(names.values(), ())))
        chosen += [each for each in found if each not in chosen]
    return chosen


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
    """The latency of models at the image size of their published top-1, and which of them no other one beats in both.

    Models take turns in groups with ``peer``, which is in all groups: a model's latency is its time in the peer's,
    round by round, times the peer's median over all groups. So a machine that is slower for some time changes little.
    It may change more for large models than for a small peer; so those of about the same accuracy, which decide on the
    front, are in a group.

    Args:
        models: names or patterns, see `choose`.
        peer: any model, as `qtvit.bench.candidates.Candidate.parse` takes it; measured at 224 px.
        runtime: a name in `qtvit.bench.runtimes.RUNTIMES`.
        precision: a name in `qtvit.bench.runtimes.DTYPES`.
        batch_size: images per forward pass.
        rounds: turns that count.
        device: see `qtvit.device.resolve_device`.

    Returns:
        "settings", "environment", "rows" by latency, each with "published_top1", "latency_seconds" (of a forward pass),
        "on_front" and the samples; and "failed".

    Raises:
        ValueError, ModuleNotFoundError: a model, runtime, precision or device that there is not; the peer failed.
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
    groups = list(_groups(results))
    with plain_fp32():
        for number, group in enumerate(groups, start=1):
            with TemporaryDirectory(prefix="qtvit-bench-") as folder:
                first = prepare(reference, way, reference_images, folder, failed)
                if first is None:
                    raise ValueError(f"the peer {peer} cannot be measured: {failed[0]['reason']}")
                entries: list[Entry] = []
                for each in progress(group, desc=f"Preparing {number} of {len(groups)}", unit="network"):
                    candidate = Candidate.parse(each.model)
                    images = example_images(batch_size, (each.img_size, each.img_size), where)
                    entry = prepare(candidate, way, images, folder, failed)
                    if entry:
                        entry.row |= {"family": each.family, "label": each.label, "published_top1": each.top1}
                        entry.row["model"] = f"{each.model} {each.img_size}"  # the same model may be there twice
                        entries.append(entry)
                measured = measure([first, *entries], peer, where, rounds, {})
                peer_seconds += measured[0]["seconds"]
                rows += measured[1:]
    if not rows:
        raise ValueError(f"nothing could be measured: {failed[0]['reason']}")
    typical = statistics.median(peer_seconds)
    for row in rows:
        row["latency_seconds"] = row["ratio"]["median"] * typical
    rows.sort(key=lambda row: (row["latency_seconds"], -row["published_top1"]))
    for row, on_front in zip(rows, pareto_front([r["published_top1"] for r in rows]), strict=True):
        row["on_front"] = on_front
    return {
        "settings": {
            "peer": peer,
            "runtime": runtime,
            "precision": precision,
            "batch_size": batch_size,
            "rounds": rounds,
        },
        "environment": environment(where),
        "peer_seconds": peer_seconds,
        "rows": rows,
        "failed": failed,
    }


def pareto_front(values: Sequence[float]) -> list[bool]:
    """Of values in the order of their cost, which are larger than all before them."""
    best = itertools.accumulate([float("-inf"), *values], max)
    return [value > before for value, before in zip(values, best, strict=False)]


def _groups(results: Sequence[Published]) -> Iterator[Sequence[Published]]:
    """`GROUP` at a time."""
    for start in range(0, len(results), GROUP):
        yield results[start : start + GROUP]
