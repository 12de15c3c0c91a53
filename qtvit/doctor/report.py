"""The doctor's results: operations with verdicts, runs of the whole model, and the report of both."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .int8 import SCHEMES, Quantized
from .measure import FORMATS, RELEASED, Numbers, decibels
from .trace import Site

HEADROOM = 8
"""Numbers within this factor of a format's largest are "close" to overflowing, as other images may go further."""
MIN_SNR = 40.0
"""dB below which an operation in fp16 or bf16 is "imprecise": a relative error of 1 %. Rounding alone gives about 70 dB
in fp16 and 50 dB in bf16.
"""
MAX_FLUSHED = 0.01
"""An imprecise operation is an "underflow" if fp16 rounds more than this fraction of its numbers other than 0 to 0."""
MIN_INT8_SNR = 30.0
"""An operation should stay out of int8 if it alone in int8 brings the model's outputs below this: an error of 3 %."""

VERDICTS = ("ok", "inputs", "close", "imprecise", "underflow", "sum", "overflow", "not finite")
"""Verdicts on an operation in a format, from best to worst. "inputs": its inputs overflow, but its outputs would not;
"sum": partial sums may overflow, but not the result.
"""
SEVERITY = {name: rank for rank, name in enumerate(VERDICTS)}


@dataclass(frozen=True)
class Operation:
    """One operation of the model.

    Attributes:
        layer: the row of the report that it belongs to.
        site: where in the model it is.
        numbers: its numbers in fp32, and their errors in fp16 and bf16.
        kept: formats in which the converted model still computes it in fp32.
        quantized: its errors in int8; None if it never runs in int8.
        output_snr: signal-to-noise ratio of the model's outputs with this operation alone in int8, in dB.
    """

    layer: str
    site: Site
    numbers: Numbers
    kept: frozenset[str] = frozenset()
    quantized: Quantized | None = None
    output_snr: float = math.inf

    @property
    def name(self) -> str:
        """What it computes, for readers."""
        source, op = self.numbers.source, self.site.op + f", sums {self.numbers.terms}" * (self.numbers.terms > 0)
        return source if self.site.op == RELEASED else f"{source} ({op})" if source else op

    def verdict(self, name: str) -> str:
        """The verdict on the operation in the format ``name``, one of `VERDICTS`."""
        numbers, limit = self.numbers, float(torch.finfo(FORMATS[name]).max)
        if numbers.non_finite or numbers.faults[name] == "zero":
            return "not finite"
        if numbers.largest > limit or numbers.faults[name] in ("output", "weight"):
            return "overflow"
        if numbers.faults[name] == "input":
            return "inputs"
        if numbers.partial > limit:
            return "sum"
        if numbers.snr(name) < MIN_SNR:
            nonzero = numbers.count - numbers.zeros
            return "underflow" if name == "fp16" and numbers.flushed > MAX_FLUSHED * nonzero else "imprecise"
        return "close" if numbers.largest > limit / HEADROOM else "ok"

    def reason(self, name: str) -> str:
        """The reason for the verdict, in words."""
        numbers, verdict = self.numbers, self.verdict(name)
        largest, snr = f"numbers up to {numbers.largest:.3g}", db_text(numbers.snr(name))
        flushed = numbers.flushed / max(numbers.count - numbers.zeros, 1)
        if verdict == "not finite" and numbers.non_finite:
            return f"{numbers.non_finite} numbers are infinite or NaN in fp32 already"
        if verdict == "overflow" and numbers.faults[name] == "weight":
            return f"a weight is too large for {name}"
        sums = f"terms that add up to {numbers.partial:.3g}"
        reasons = {
            "not finite": f"infinite or NaN in {name}, where an input becomes 0",
            "inputs": f"its inputs overflow in {name}",
            "sum": f"{largest}, of {sums}: overflows where a runtime adds them up in {name}",
            "underflow": f"{flushed:.0%} of the numbers become 0; {snr}",
            "imprecise": snr,
        }
        return reasons.get(verdict, largest)

    @property
    def is_weighted(self) -> bool:
        """Whether it multiplies with weights, so that quantizers put it in int8 by default."""
        return self.quantized is not None and self.quantized.weighted

    @property
    def is_sensitive(self) -> bool:
        """Whether it should stay in higher precision than int8."""
        return self.output_snr < MIN_INT8_SNR

    def int8_reason(self) -> str:
        """Why it loses precision in int8, in words."""
        found = self.quantized
        assert found is not None
        schemes = {name: decibels(found.input_signal, found.input_noise[name]) for name in SCHEMES}
        best = max(schemes, key=schemes.__getitem__)
        text = f"model outputs {db_text(self.output_snr)} with this alone in int8"
        text += f"; its input {db_text(schemes[SCHEMES[0]])}"
        if schemes[best] > schemes[SCHEMES[0]] + 3:
            text += f" ({db_text(schemes[best])} with an {best} range)"
        if found.weighted:
            text += f", channels {found.input_spread:.1f}× the median; weights {db_text(found.weight_snr)}"
            text += f", channels {found.weight_spread:.1f}×"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        numbers, found = self.numbers, self.quantized
        fields = {key: value for key, value in asdict(numbers).items() if key not in ("signal", "noise", "faults")}
        row = {"layer": self.layer, **self.site._asdict(), "name": self.name, **fields, "largest": numbers.largest}
        for name in FORMATS:
            row[name] = {
                "verdict": self.verdict(name),
                "snr_db": numbers.snr(name),
                "kept_in_fp32": name in self.kept,
                "fault": numbers.faults[name],
            }
        if found is not None:
            row["int8"] = {
                "keep_in_higher_precision": self.is_sensitive,
                "model_output_snr_db": self.output_snr,
                "snr_db": decibels(found.signal, found.noise),
                "input_snr_db": {name: decibels(found.input_signal, found.input_noise[name]) for name in SCHEMES},
                "input_range": found.ranges[0].ends(),
                "input_range_clipped": found.ranges[0].ends("asymmetric clipped"),
                "input_spread": found.input_spread,
                "weighted": found.weighted,
            }
            if found.weighted:
                row["int8"] |= {
                    "weight_snr_db": found.weight_snr,
                    "weight_snr_db_per_tensor": found.tensor_weight_snr,
                    "weight_spread": found.weight_spread,
                }
        return row


@dataclass(frozen=True)
class Run:
    """The whole model in a format on all images, compared with fp32.

    Attributes:
        name: the format, and what is kept out of it.
        cast: whether all operations were cast, also those that the model keeps in fp32.
        agreement: fraction of images with the same most probable class; None if the outputs are not logits.
        snr: signal-to-noise ratio of the finite outputs in dB; the mean is subtracted from logits first.
        largest, mean: largest and mean magnitude of the differences.
        num_bad: number of outputs that are infinite or NaN.
        first: the first operation with such outputs.
        error: why the model could not be run; "" if it could.
    """

    name: str
    cast: bool = False
    agreement: float | None = None
    snr: float = math.nan
    largest: float = math.nan
    mean: float = math.nan
    num_bad: int = 0
    first: str = ""
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What `qtvit.doctor.examine` found about a model.

    ``data`` says where the images are from; ``is_random`` is whether the weights are random, as the model was given by
    name; ``operations`` are in the order of the forward pass.
    """

    model: str
    is_random: bool
    num_params: int
    data: str
    num_images: int
    img_size: tuple[int, int]
    device: str
    operations: tuple[Operation, ...]
    runs: tuple[Run, ...]

    @property
    def is_finite(self) -> bool:
        """Whether the model's outputs are finite in every format, with whatever it keeps in fp32 left in fp32."""
        return not any(run.num_bad for run in self.runs if not run.cast)

    @property
    def sensitive(self) -> list[Operation]:
        """The operations that should stay in higher precision than int8, the worst first."""
        return sorted((op for op in self.operations if op.is_sensitive), key=lambda op: op.output_snr)

    @property
    def keep(self) -> list[str]:
        """Names of the modules with `sensitive` operations, to leave out when quantizing to int8."""
        return list(dict.fromkeys(op.site.module for op in self.sensitive))

    def layers(self) -> Mapping[str, list[Operation]]:
        """The operations by layer."""
        found: dict[str, list[Operation]] = {}
        for op in self.operations:
            found.setdefault(op.layer, []).append(op)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON: infinite numbers and NaN are the strings "inf", "-inf" and "nan"."""
        fields = {name: value for name, value in vars(self).items() if name not in ("operations", "runs")}
        fields |= {"torch": torch.__version__, "is_finite": self.is_finite}
        fields |= {"keep_in_higher_precision_than_int8": self.keep, "runs": [asdict(run) for run in self.runs]}
        return _plain(fields | {"operations": [op.to_dict() for op in self.operations]})


def worst(operations: list[Operation], name: str, cast: bool = False) -> str:
    """The worst verdict on operations in a format; without ``cast``, of those that the model does not keep in fp32."""
    verdicts = [op.verdict(name) for op in operations if op.numbers.non_finite or cast or name not in op.kept]
    return max(verdicts, key=SEVERITY.__getitem__, default="ok")


def db_text(value: float) -> str:
    """A signal-to-noise ratio as text."""
    return f"{round(value)} dB" if math.isfinite(value) else "exact" if value == math.inf else "not finite"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
