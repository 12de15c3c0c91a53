"""What an ablation found: means, paired differences with their intervals, and the paper's numbers beside them."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from qtvit.files import replacing, write_text
from qtvit.version import __version__

from .tables import Table, get_table

CONFIDENCE = 0.95
Outcomes = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Summaries of runs, or why they failed, by row and seed."""


@dataclass(frozen=True)
class Difference:
    """Of a row's scores to those of the default with the same seeds.

    Attributes:
        mean: in percentage points.
        low, high: 95 % interval of Student's t for it; None with one seed.
        seeds: that both have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: list[int]


@dataclass(frozen=True)
class RowResult:
    """One line of the table.

    Attributes:
        name: of the row.
        is_default: whether the others are compared with it.
        model_args: what it changes.
        scores: top-1 in percent by seed.
        failed: by seed, why there is no score.
        mean, sd: of the scores; sd is None with fewer than two.
        difference: to the default; None for the default itself, and without a seed that both have.
        num_params, num_macs: of the model.
        images_per_second: of the training step, the median of the seeds.
        paper: top-1 that the paper reports.
        paper_difference: of the paper's top-1 to that of its default.
    """

    name: str
    is_default: bool
    model_args: dict[str, Any]
    scores: dict[int, float]
    failed: dict[int, str]
    mean: float | None
    sd: float | None
    difference: Difference | None
    num_params: int | None
    num_macs: int | None
    images_per_second: float | None
    paper: float | None
    paper_difference: float | None


def paired_difference(scores: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """``scores`` less ``others``, seed by seed; None if they have no seed in common."""
    seeds = sorted(scores.keys() & others.keys())
    if not seeds:
        return None
    differences = [scores[seed] - others[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return Difference(mean, None, None, seeds)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1))
    half = quantile * statistics.stdev(differences) / len(seeds) ** 0.5
    return Difference(mean, mean - half, mean + half, seeds)


def summarize(table: Table, outcomes: Outcomes) -> list[RowResult]:
    """The rows of ``table`` that have outcomes, the default first."""
    default = table.rows[table.default]
    scores = {
        row: {seed: float(run["top1"]) for seed, run in runs.items() if "top1" in run} for row, runs in outcomes.items()
    }
    results = []
    for name in sorted(outcomes, key=lambda name: (name != table.default, list(table.rows).index(name))):
        row, values = table.rows[name], list(scores[name].values())
        done = [outcomes[name][seed] for seed in scores[name]]
        speeds = [speed for run in done if (speed := run["train_images_per_second"]) is not None]
        is_default = name == table.default
        paper_difference = None
        if row.paper is not None and default.paper is not None and not is_default:
            paper_difference = round(row.paper - default.paper, 2)
        results.append(
            RowResult(
                name=name,
                is_default=is_default,
                model_args=dict(row.model_args),
                scores=scores[name],
                failed={seed: str(run["failed"]) for seed, run in outcomes[name].items() if "failed" in run},
                mean=statistics.fmean(values) if values else None,
                sd=statistics.stdev(values) if len(values) > 1 else None,
                difference=None if is_default else paired_difference(scores[name], scores.get(table.default, {})),
                num_params=done[0]["num_params"] if done else None,
                num_macs=done[0]["num_macs"] if done else None,
                images_per_second=statistics.median(speeds) if speeds else None,
                paper=row.paper,
                paper_difference=paper_difference,
            )
        )
    return results


def write_results(folder: Path, name: str, outcomes: Outcomes, settings: Mapping[str, Any], command: str) -> list[str]:
    """Write results.json, results.md and results.png; the lines of the table."""
    table = get_table(name)
    results = summarize(table, outcomes)
    content = {
        "table": name,
        "title": table.title,
        "command": command,
        "default": table.default,
        "settings": dict(settings),
        "versions": _versions(),
        "rows": [asdict(result) for result in results],
        "runs": {row: {str(seed): dict(run) for seed, run in runs.items()} for row, runs in outcomes.items()},
    }
    write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")
    cells = _cells(results)
    markdown = "\n".join(
        [f"# {table.title}", "", "```sh", command, "```", "", *_markdown(cells), "", *_notes(settings)]
    )
    write_text(folder / "results.md", markdown + "\n" + "".join(f"- {line}\n" for line in _failures(results)))
    figure = plot_results(table, results, settings)
    with replacing(folder / "results.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return [*_aligned(cells), *_failures(results)]


def _versions() -> dict[str, str]:
    versions = {"qtvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {**versions, "python": platform.python_version(), "platform": platform.platform()}


def _notes(settings: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    scored = "of the last epoch, scored once"
    if settings["eval_every"] < settings["epochs"]:
        scored = "of the best of several epochs, chosen on the held-out images themselves"
    return [
        f"Mean ± standard deviation of the top-1 in percent on the held-out images, {scored}; difference to the",
        "default by seed, with the 95 % interval of Student's t. The paper's numbers are of QT-ViT-1 on ImageNet-1k",
        "after its whole recipe: another task and budget than this one.",
        "",
    ]


HEADER = ["row", "seeds", "top-1 %", "difference [95 %]", "params M", "MACs G", "train img/s", "paper", "paper diff."]


def _cells(results: Sequence[RowResult]) -> list[list[str]]:
    rows = [HEADER]
    for result in results:
        change = "(default)" if result.is_default else "–"
        if (difference := result.difference) is not None:
            change = f"{difference.mean:+.2f}"
            if difference.low is not None and difference.high is not None:
                change += f" [{difference.low:+.2f}, {difference.high:+.2f}]"
        rows.append(
            [
                result.name,
                str(len(result.scores)),
                "–" if result.mean is None else mean_and_sd(result.mean, result.sd),
                change,
                _number(result.num_params, 1e6, ".2f"),
                _number(result.num_macs, 1e9, ".4f"),
                _number(result.images_per_second, 1, ".0f"),
                _number(result.paper, 1, ".1f"),
                _number(result.paper_difference, 1, "+.1f"),
            ]
        )
    return rows


def _number(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else format(value / unit, form)


def mean_and_sd(mean: float, sd: float | None) -> str:
    """Such as 76.12 ± 0.31; without a deviation if there is none."""
    return f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else "")


def _failures(results: Sequence[RowResult]) -> list[str]:
    return [f"{row.name}, seed {seed} failed: {reason}" for row in results for seed, reason in row.failed.items()]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, 3) else cell.rjust(width) for i, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]


def _markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [header, "|---|" + "---:|" * (len(cells[0]) - 1), *rows]


def plot_results(table: Table, results: Sequence[RowResult], settings: Mapping[str, Any]) -> Figure:
    """The rows' differences to the default: a point a seed, the mean with its interval, the paper's as a hollow one.

    What lies far outside is drawn at the edge, with its number.
    """
    figure = Figure(figsize=(9, 1.8 + 0.42 * len(results)), layout="constrained")
    axes = figure.subplots()
    base = next((result for result in results if result.is_default), None)
    origin = base.mean if base is not None and base.mean is not None else 0.0
    default = base.scores if base is not None else {}
    edge = _edge(results, default)
    axes.axvline(0, color="grey", linewidth=1)
    for y, result in enumerate(results):
        _draw_row(axes, y, result, default, edge)
    labels = [f"{r.name}\n{mean_and_sd(r.mean, r.sd)}" if r.mean is not None else f"{r.name}\nfailed" for r in results]
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.set(xlim=(-edge, edge), ylim=(len(results) - 0.4, -0.6))
    axes.set_xlabel(f"top-1 less that of {table.default} ({origin:.2f} %), percentage points")
    axes.set_title(f"{settings['model'] or 'model'} on {Path(settings['data']).name}: {table.title}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    for marker, label, face in (
        ("o", "a seed", "lightsteelblue"),
        ("D", "mean, 95 % interval", "tab:blue"),
        ("D", "the paper's, on ImageNet", "none"),
    ):
        color = "tab:red" if face == "none" else face
        axes.plot([], [], marker, markerfacecolor=face, markeredgecolor=color, label=label)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _points(result: RowResult, default: Mapping[int, float]) -> list[float]:
    """The differences of a row by seed; of the default itself, those to its mean."""
    if result.is_default:
        return [score - (result.mean or 0) for score in result.scores.values()]
    return [result.scores[seed] - default[seed] for seed in result.difference.seeds] if result.difference else []


def _edge(results: Sequence[RowResult], default: Mapping[int, float]) -> float:
    """Half the width of the axis: what is more than six times the median distance does not count."""
    values = [abs(point) for result in results for point in _points(result, default)]
    values += [abs(result.paper_difference or 0) for result in results]
    values = [value for value in values if value] or [1.0]
    return 1.2 * max(value for value in values if value <= 6 * statistics.median(values))


def _draw_row(axes: Axes, y: float, result: RowResult, default: Mapping[int, float], edge: float) -> None:
    """One row of the picture at height ``y``."""
    points = _points(result, default)
    axes.plot(points, [y] * len(points), "o", color="lightgrey" if result.is_default else "lightsteelblue")
    if result.difference is not None:
        if result.difference.low is not None and result.difference.high is not None:
            axes.plot([result.difference.low, result.difference.high], [y, y], "-", color="tab:blue")
        _draw_mark(axes, result.difference.mean, y, edge, "tab:blue", face="tab:blue")
    if result.paper_difference is not None:
        _draw_mark(axes, result.paper_difference, y + 0.25, edge, "tab:red", face="none")


def _draw_mark(axes: Axes, x: float, y: float, edge: float, color: str, face: str) -> None:
    if abs(x) <= edge:
        axes.plot([x], [y], "D", markerfacecolor=face, markeredgecolor=color, markersize=6)
        return
    side = 1 if x > 0 else -1
    axes.plot([0.97 * side * edge], [y], ">" if x > 0 else "<", markerfacecolor=face, markeredgecolor=color)
    align = "right" if x > 0 else "left"
    axes.text(0.94 * side * edge, y, f"{x:+.1f}", color=color, ha=align, va="center", fontsize=8)
