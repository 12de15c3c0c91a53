"""The results of the benchmarks as lines for the terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
GROWTH_TO = 1024**2
"""Pixels up to which the growth from the smallest image is told."""


def settings_line(result: Result) -> str:
    """What the numbers depend on."""
    entries = {**result["environment"], **result["settings"]}
    shown = {name: size_text(value) if name == "img_size" else _plain(value) for name, value in entries.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def latency_lines(result: Result) -> Iterator[str]:
    """A row for each network, runtime, precision and size; then what matrix products reach, and what was left out."""
    rows = result["rows"]
    has_memory = any(row.get("peak_bytes") for row in rows)
    cells = [
        [
            row["model"],
            row["runtime"],
            row["precision"],
            size_text(row["img_size"]),
            str(row["batch_size"]),
            f"{1e3 * row['median_seconds']:.2f}",
            f"{row['images_per_second']:.1f}",
            ratio_text(row["ratio"]),
            _number(row["num_params"], 1e6, 2),
            _number(row["num_macs"], 1e9, 3),
            _number(row["gflops"], 1, 1),
            "–" if row["peak_fraction"] is None else f"{row['peak_fraction']:.1%}",
            *([_number(row.get("peak_bytes"), 1e6, 0)] if has_memory else []),
            "" if row["output_error"] is not None or row["form"] == "exported" else "outputs are not finite!",
        ]
        for row in rows
    ]
    head = [
        "model",
        "runtime",
        "precision",
        "px",
        "batch",
        "ms",
        "img/s",
        "time / peer (quartiles)",
        "params M",
        "MACs G",
    ]
    yield from table([*head, "GFLOP/s", "of peak", *(["peak MB"] if has_memory else []), ""], cells, left=(0, 1, 2))
    for precision, peak in result["matmul_peaks"].items():
        yield (
            f"matrix products in {precision}: {peak['gflops']:.1f} GFLOP/s at the best ({peak['runtime']}, "
            f"{peak['size']} x {peak['size']})"
        )
    yield from left_out(result)


def train_lines(result: Result) -> Iterator[str]:
    """A row for each network."""
    cells = [
        [
            name,
            f"{row['bytes_kept_per_image'] / 1e6:.1f}",
            f"{row['bytes_kept_ratio']:.2f}",
            f"{1e3 * row['step_median_seconds']:.1f}",
            ratio_text(row["step_ratio"]),
        ]
        for name, row in result["models"].items()
    ]
    yield from table(["model", "kept MB/image", "ratio", "step ms", "ratio (quartiles)"], cells)


def loader_lines(result: Result) -> Iterator[str]:
    """A row for each loader."""
    cells = [
        [name, f"{row['images_per_second']:.1f}", ratio_text(row["ratio"])] for name, row in result["loaders"].items()
    ]
    yield from table(["loader", "images/s", "ratio (quartiles)"], cells)


def scaling_lines(result: Result) -> Iterator[str]:
    """For each part a table of times by size, exponents, crossovers and growth."""
    curves = result["curves"]
    for part in dict.fromkeys(curve["part"] for curve in curves):
        mine = [curve for curve in curves if curve["part"] == part]
        sizes = sorted({size for curve in mine for size in curve["sizes"]})
        unit = mine[0]["unit"]
        times = [dict(zip(curve["sizes"], curve["median_seconds"], strict=True)) for curve in mine]
        yield f"{part} (ms)"
        yield from table(
            [unit, *(curve["name"] for curve in mine)],
            [[f"{size:,}", *(_number(by_size.get(size), 1e-3, 3) for by_size in times)] for size in sizes],
        )
        for curve in mine:
            if curve["exponent"] is not None:
                growth = growth_text(curve) if unit == "pixels" else ""
                yield f"{curve['name']}: time grows as {unit}^{curve['exponent']:.2f}{growth}"
        for cross in result["crossovers"]:
            if cross["part"] == part:
                yield crossover_text(cross, unit)
        yield ""
    yield from left_out(result)


def growth_text(curve: Result) -> str:
    """Of a network, the growth of its time up to `GROWTH_TO` pixels, or as far as it was measured."""
    within = [index for index, size in enumerate(curve["sizes"]) if size <= GROWTH_TO]
    if not within or within[-1] == 0:
        return ""
    last = within[-1]
    sides = [f"{round(curve['sizes'][i] ** 0.5)}" for i in (0, last)]
    pixels = curve["sizes"][last] / curve["sizes"][0]
    grown = curve["median_seconds"][last] / curve["median_seconds"][0]
    return f"; from {sides[0]} to {sides[1]} px, {pixels:.1f} times the pixels take {grown:.1f} times as long"


def crossover_text(cross: Result, unit: str) -> str:
    """From where on one is faster than another."""
    if cross["wins"] == "from":
        where = f"from {cross['at']:,.0f} {unit} on"
    else:
        where = "at every size" if cross["wins"] == "always" else "not at the largest size"
    return f"{cross['faster']} is faster than {cross['than']} {where}"


def pareto_lines(result: Result) -> Iterator[str]:
    """A row for each model, the quickest first, those on the front marked."""
    cells = [
        [
            "*" if row["on_front"] else "",
            row["label"],
            row["family"],
            f"{row['published_top1']:.1f}",
            f"{1e3 * row['latency_seconds']:.2f}",
            f"{row['batch_size'] / row['latency_seconds']:.1f}",
            ratio_text(row["ratio"]),
            _number(row["num_params"], 1e6, 2),
            _number(row["num_macs"], 1e9, 3),
        ]
        for row in result["rows"]
    ]
    head = [
        "",
        "model, px",
        "family",
        "published top-1",
        "ms",
        "img/s",
        "time / peer (quartiles)",
        "params M",
        "MACs G",
    ]
    yield from table(head, cells, left=(0, 1, 2))
    yield "* nothing here is both quicker and more accurate. Accuracy is as published, not measured here."
    yield from left_out(result)


def left_out(result: Result) -> Iterator[str]:
    """What could not be measured, and why."""
    for row in result["failed"]:
        where = " ".join(filter(None, (row["model"], row["runtime"], row["precision"], size_text(row["img_size"]))))
        yield f"left out: {where}: {row['reason']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Rows of aligned columns; those numbered ``left`` to the left, all others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        pairs = enumerate(zip(line, widths, strict=True))
        yield "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in pairs).rstrip()


def ratio_text(ratio: Result | None) -> str:
    """The median and the quartiles."""
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def size_text(img_size: Sequence[int]) -> str:
    """224, or 160x256."""
    return "x".join(map(str, dict.fromkeys(img_size)))


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def _plain(value: Any) -> str:
    """A setting without the brackets of Python."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(size_text(each) if isinstance(each, (list, tuple)) else str(each) for each in value)
    return str(value)
