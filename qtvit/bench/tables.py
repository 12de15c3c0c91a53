"""The benchmarks' results as lines for the terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
"""What a benchmark returns, or one of its rows."""
GROWTH_TO = 1024**2
"""Largest number of pixels for which the growth from the smallest image is reported."""
TIMES = ("ms", "img/s", "time / peer (quartiles)", "params M", "MACs G")
"""Heads of the columns that tables of latencies share."""


def settings_line(result: Result) -> str:
    """The environment and settings of a benchmark, in one line."""
    entries = {**result["environment"], **result["settings"]}
    shown = {name: size_text(value) if name == "img_size" else _plain(value) for name, value in entries.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def latency_lines(result: Result) -> Iterator[str]:
    """A row per network, runtime, precision and size; the speed of matrix products; what was left out."""
    rows = result["rows"]
    has_memory = any(row.get("peak_bytes") for row in rows)
    cells = [
        [
            row["model"],
            row["runtime"],
            row["precision"],
            size_text(row["img_size"]),
            str(row["batch_size"]),
            *_times(row, row["median_seconds"]),
            _number(row["gflops"], 1, 1),
            "–" if row["peak_fraction"] is None else f"{row['peak_fraction']:.1%}",
            *([_number(row.get("peak_bytes"), 1e6, 0)] if has_memory else []),
            "" if row["output_error"] is not None or row["form"] == "exported" else "outputs are not finite!",
        ]
        for row in rows
    ]
    head = ["model", "runtime", "precision", "px", "batch", *TIMES, "GFLOP/s", "of peak"]
    yield from table([*head, *(["peak MB"] if has_memory else []), ""], cells, left=(0, 1, 2))
    for precision, peak in result["matmul_peaks"].items():
        yield (
            f"matrix products in {precision}: {peak['gflops']:.1f} GFLOP/s at the best ({peak['runtime']}, "
            f"{peak['size']} x {peak['size']})"
        )
    yield from left_out(result)


def train_lines(result: Result) -> Iterator[str]:
    """A row per network with the memory and time of a training step."""
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
    """A row per loader with its speed."""
    cells = [
        [name, f"{row['images_per_second']:.1f}", ratio_text(row["ratio"])] for name, row in result["loaders"].items()
    ]
    yield from table(["loader", "images/s", "ratio (quartiles)"], cells)


def scaling_lines(result: Result) -> Iterator[str]:
    """Attention alone and whole networks: for each a table of times by size, then exponents and crossovers."""
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
    """How much a network's time grows from the smallest image to the largest one within `GROWTH_TO` pixels."""
    sizes = [size for size in curve["sizes"] if size <= GROWTH_TO]
    if len(sizes) < 2:
        return ""
    first, last = round(sizes[0] ** 0.5), round(sizes[-1] ** 0.5)
    grown = curve["median_seconds"][len(sizes) - 1] / curve["median_seconds"][0]
    return f"; from {first} to {last} px, {sizes[-1] / sizes[0]:.1f} times the pixels take {grown:.1f} times as long"


def crossover_text(cross: Result, unit: str) -> str:
    """From which size on one curve is faster than another."""
    where = {"always": "at every size", "never": "not at the largest size"}.get(cross["wins"])
    where = where or f"from {cross['at']:,.0f} {unit} on"
    return f"{cross['faster']} is faster than {cross['than']} {where}"


def pareto_lines(result: Result) -> Iterator[str]:
    """A row per model, the quickest first; those on the Pareto front have a star."""
    cells = [
        [
            "*" if row["on_front"] else "",
            row["label"],
            row["family"],
            f"{row['published_top1']:.1f}",
            *_times(row, row["latency_seconds"]),
        ]
        for row in result["rows"]
    ]
    yield from table(["", "model, px", "family", "published top-1", *TIMES], cells, left=(0, 1, 2))
    yield "* nothing here is both quicker and more accurate. Accuracy is as published, not measured here."
    yield from left_out(result)


def left_out(result: Result) -> Iterator[str]:
    """A line for each network that could not be measured, with the reason."""
    for row in result["failed"]:
        where = " ".join(filter(None, (row["model"], row["runtime"], row["precision"], size_text(row["img_size"]))))
        yield f"left out: {where}: {row['reason']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Rows in aligned columns: those with the numbers ``left`` to the left, all others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        pairs = enumerate(zip(line, widths, strict=True))
        yield "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in pairs).rstrip()


def ratio_text(ratio: Result | None) -> str:
    """A ratio as "median (quartile–quartile)"."""
    return "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def size_text(img_size: Sequence[int]) -> str:
    """An image size (H, W) as 160x256, or as 224 if it is square."""
    return "x".join(map(str, dict.fromkeys(img_size)))


def _times(row: Result, seconds: float) -> list[str]:
    """The cells below `TIMES` for a forward pass that takes ``seconds``."""
    speed = [f"{1e3 * seconds:.2f}", f"{row['batch_size'] / seconds:.1f}", ratio_text(row["ratio"])]
    return [*speed, _number(row["num_params"], 1e6, 2), _number(row["num_macs"], 1e9, 3)]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def _plain(value: Any) -> str:
    """A setting without Python's brackets."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(size_text(each) if isinstance(each, (list, tuple)) else str(each) for each in value)
    return str(value)
