"""The doctor's report as lines of text."""

import math
from collections.abc import Iterator, Sequence

from .measure import FORMATS, FP16, RELEASED
from .report import MIN_SNR, SEVERITY, Operation, Report, Run, db_text, worst

MAX_LAYERS = 20
"""Number of layers to show unless all are asked for."""
WIDTHS = (10, 6, 6, 10, 6)
"""Widths of the columns with the verdicts and signal-to-noise ratios of a layer."""
MAX_LINES = 4
"""Number of problems to show below a layer unless all are asked for."""
INT8_SEVERITY = SEVERITY["underflow"] + 0.5
"""Rank of precision lost in int8 among the verdicts of `SEVERITY`."""


def lines(report: Report, show_all: bool = False) -> Iterator[str]:
    """The layers, the worst first, each followed by its problems; the runs of the whole model; a summary."""
    height, width = report.img_size
    images = f"{report.num_images} images of {height}x{width} from {report.data}"
    yield f"{report.model}: {report.num_params / 1e6:.2f} M parameters, {images}, {report.device}"
    if report.is_random:
        yield "the weights are random: what follows is of little use but to try this out"
    yield ""
    yield from _table(report, show_all)
    yield ""
    yield from _runs(report.runs)
    yield ""
    yield from _summary(report)


def _table(report: Report, show_all: bool) -> Iterator[str]:
    layers = report.layers()
    ranked = sorted(layers, key=lambda layer: _badness(layers[layer]), reverse=True)
    shown = ranked if show_all else ranked[:MAX_LAYERS]
    width = max(map(len, ["layer", *shown]))
    yield f"{'':<{width}}  {'':>19}  {'as the model runs':^26}  {'all of it cast':^18}".rstrip()
    heads = [f"{head:>{size}}" for head, size in zip(("fp16", "bf16", "int8", "fp16", "int8"), WIDTHS, strict=True)]
    yield f"{'layer':<{width}}  {'range in fp32':>19}  {'  '.join(heads)}"
    for layer in shown:
        row = layers[layer]
        computed = [op for op in row if op.numbers.low <= op.numbers.high and op.site.op != RELEASED]
        low = min((op.numbers.low for op in computed), default=math.nan)
        high = max((op.numbers.high for op in computed), default=math.nan)
        span = f"{low:.3g} … {high:.3g}"
        cells = [worst(row, "fp16"), _least([op.numbers.snr("bf16") for op in row if "bf16" not in op.kept])]
        cells.append(_least([op.output_snr for op in row if op.is_weighted]))
        cells.append(worst(row, "fp16", cast=True) if any(op.kept for op in row) else "")
        cells.append(_least([op.output_snr for op in row if op.quantized and not op.is_weighted]))
        text = [f"{cell:>{size}}" for cell, size in zip(cells, WIDTHS, strict=True)]
        yield f"{layer:<{width}}  {span:>19}  {'  '.join(text)}".rstrip()
        problems = [f"    {problem}" for problem in _problems(row)]
        cut = len(problems) if show_all else MAX_LINES
        yield from problems[:cut]
        if len(problems) > cut:
            yield f"    … and {len(problems) - cut} more"
    if len(ranked) > len(shown):
        yield f"… and {len(ranked) - len(shown)} more layers that are no worse (--all shows them)"


def _badness(ops: list[Operation]) -> tuple[float, ...]:
    """Sort key of a layer: first the problems of the model as it runs, then those of casting all of it."""
    rank = (
        max(SEVERITY[worst(ops, name)] for name in FORMATS),
        any(op.is_sensitive and op.is_weighted for op in ops),
        SEVERITY[worst(ops, "fp16", cast=True)],
        any(op.is_sensitive for op in ops),
    )
    return (*rank, 0.0 if any(rank) else -min(op.output_snr for op in ops))


def _least(ratios: Sequence[float]) -> str:
    """The lowest ratio in ``ratios`` as text; "" if there are none."""
    return db_text(min(ratios)) if ratios else ""


def _problems(row: Sequence[Operation]) -> Iterator[str]:
    """A line for each problem of a layer's operations, the worst first; operations with the same problem share one."""
    found: dict[tuple[str, str, str, bool], list[Operation]] = {}
    for op in row:
        for name in FORMATS:
            verdict = op.verdict(name)
            if SEVERITY[verdict] > SEVERITY["inputs"]:
                found.setdefault((name, verdict, op.name, name in op.kept), []).append(op)
        if op.is_sensitive:
            found.setdefault(("int8", "", op.name, False), []).append(op)
    ranked = sorted(found.items(), key=lambda item: (-SEVERITY.get(item[0][1], INT8_SEVERITY), item[0][3]))
    for (name, verdict, what, is_kept), ops in ranked:
        times = f" ×{len(ops)}" * (len(ops) > 1)
        if name == "int8":
            yield f"int8: {what}{times}: {min(ops, key=lambda op: op.output_snr).int8_reason()}"
            continue
        op = max(ops, key=lambda op: (op.numbers.partial, op.numbers.largest))
        note = "; the model keeps it in fp32" if is_kept else ""
        note = "; not in this model" if op.site.op == RELEASED else note
        yield f"{name} {verdict}: {what}{times}: {op.reason(name)}{note}"


def _runs(runs: Sequence[Run]) -> Iterator[str]:
    names = {id(run): f"{run.name}, all of it cast" if run.cast else run.name for run in runs}
    width = max(map(len, ["whole model", *names.values()]))
    yield f"{'whole model':<{width}}  top-1 as fp32  outputs  largest error  mean error  not finite"
    for run in runs:
        if run.name == "fp32" and not run.num_bad:
            continue
        if run.error:
            yield f"{names[id(run)]:<{width}}  cannot be run here: {run.error}"
            continue
        agreement = "" if run.agreement is None else f"{run.agreement:.1%}"
        snr = "" if math.isnan(run.snr) else db_text(run.snr)
        first = f"  first in {run.first}" if run.num_bad and run.first else ""
        yield (
            f"{names[id(run)]:<{width}}  {agreement:>13}  {snr:>7}  {run.largest:>13.3g}  {run.mean:>10.2g}  "
            f"{run.num_bad:>10}{first}"
        )


def _summary(report: Report) -> Iterator[str]:
    operations, runs = report.operations, {(run.name, run.cast): run for run in report.runs}
    if (exact := runs["fp32", False]).num_bad:
        yield f"fp32: {exact.num_bad} outputs are infinite or NaN, first in {exact.first}"
    for name in FORMATS:
        run = runs[name, False]
        kept = [op for op in operations if name in op.kept and op.site.op != RELEASED]
        own = [op for op in operations if name not in op.kept]
        bad = f"{run.num_bad} outputs are infinite or NaN, first in {run.first}" if run.num_bad else ""
        problems = ", ".join(filter(None, (bad, _verdicts(own, name))))
        unknown = " (what the model keeps in fp32 is not known)" * bool(run.error)
        yield f"{name}: {problems or _largest_text(own, name)}{unknown}"
        if kept:
            text = _verdicts(kept, name)
            more = f"of these, if a runtime cast them: {text}" if text else "they would be fine in it too"
            yield f"      {len(kept)} operations stay in fp32 within the model; {more}"
        if name == "fp16" and (text := _verdicts([op for op in operations if op.site.op == RELEASED], name)):
            yield f"      the released code in {name}: {text}"
    yield from _int8_summary(report, runs.get(("int8", False)))


def _int8_summary(report: Report, run: Run | None) -> Iterator[str]:
    if run is None:
        yield "int8: no convolutions, linear layers or matrix products to run in it"
        return
    agreement = "" if run.agreement is None else f"top-1 as fp32 {run.agreement:.1%}, "
    weighted = [op for op in report.operations if op.is_weighted]
    layers = list(dict.fromkeys(op.site.module for op in report.sensitive if op.is_weighted))
    worst_op = min(weighted, key=lambda op: op.output_snr)
    text = f"keep these in higher precision: {', '.join(layers)}"
    if not layers:
        text = f"no layer alone costs much; most sensitive: {worst_op.site.module} ({db_text(worst_op.output_snr)})"
    yield f"int8: {agreement}outputs {db_text(run.snr)}; {text}"
    products = [op for op in report.operations if op.quantized and not op.is_weighted]
    if products:
        bad = [op for op in report.sensitive if op in products]
        least = min(products, key=lambda op: op.output_snr)
        modules = ", ".join(dict.fromkeys(op.site.module for op in bad))
        more = f"keep those of {modules} in higher precision" if bad else "none alone costs much"
        yield (
            f"      {len(products)} products of activations are not in it; if a quantizer took them: {more} (worst: "
            f"{least.site.module}: {least.name}, {db_text(least.output_snr)})"
        )


def _verdicts(operations: Sequence[Operation], name: str) -> str:
    """The number of operations with each bad verdict in a format, and the first of each; "" if there are none."""
    limit = f"{FP16.max:.0f}" if name == "fp16" else "overflow"
    words = {
        "not finite": ("gives infinite numbers or NaN", "give infinite numbers or NaN"),
        "overflow": ("overflows", "overflow"),
        "sum": (f"overflows where sums are added up in {name}", f"overflow where sums are added up in {name}"),
        "underflow": ("loses numbers to 0", "lose numbers to 0"),
        "imprecise": (f"is imprecise (below {MIN_SNR:.0f} dB)", f"are imprecise (below {MIN_SNR:.0f} dB)"),
        "close": (f"comes close to {limit}", f"come close to {limit}"),
    }
    parts = []
    for verdict, (one, several) in words.items():
        found = [op for op in operations if op.verdict(name) == verdict]
        if found:
            first = f"{found[0].site.module}: {found[0].name}".removeprefix(": ")
            parts.append(f"1 {one} ({first})" if len(found) == 1 else f"{len(found)} {several} (the first: {first})")
    return ", ".join(parts)


def _largest_text(operations: Sequence[Operation], name: str) -> str:
    largest = max((op.numbers.largest for op in operations), default=0.0)
    limit = f" (the limit is {FP16.max:.0f})" if name == "fp16" else ""
    least = min((op.numbers.snr(name) for op in operations), default=math.inf)
    return f"safe: numbers up to {largest:.3g}{limit}, every operation {db_text(least)} or better"
