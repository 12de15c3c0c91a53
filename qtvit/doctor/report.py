"""What was found in a model, and what follows from it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .int8 import SCHEMES, Quantized
from .measure import FORMATS, RELEASED, Numbers, decibels
from .trace import Site

HEADROOM = 8
"""Numbers within this factor of a format's largest are "close" to overflowing: other images may go further."""
MIN_SNR = 40.0
"""dB below which an operation in fp16 or bf16 is "imprecise": a relative error of 1 %. Rounding alone gives about 70 dB
in fp16 and 50 dB in bf16.
"""
MAX_FLUSHED = 0.01
"""Share of the numbers other than 0, of an operation that is imprecise, above which 0s are to blame: "underflow"."""
MIN_INT8_SNR = 30.0
"""dB of the model's outputs below which an operation, alone in int8, should rather not be: an error of 3 %."""

SEVERITY = {
    name: rank
    for rank, name in enumerate(("ok", "inputs", "close", "imprecise", "underflow", "sum", "overflow", "not finite"))
}
"""What can be said of an operation in a format, from good to bad. "inputs": they overflow, but its outputs would not;
"sum": partial sums may overflow, but not the result.
"""


@dataclass(frozen=True)
class Operation:
    """One operation of the model.

    Attributes:
        layer: the row of the report that it belongs to.
        site: where in the model it is.
        numbers: what it computes in fp32, and its errors in fp16 and bf16.
        kept: the formats in which the model, converted to them, computes it in fp32 nevertheless.
        quantized: its errors in int8; None if it never runs in int8.
        output_snr: of the model's outputs if this operation alone is in int8, in dB.
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
        sums = f", sums {self.numbers.terms}" * (self.numbers.terms > 0)
        if self.site.op == RELEASED:
            return self.numbers.source
        return f"{self.numbers.source} ({self.site.op}{sums})" if self.numbers.source else f"{self.site.op}{sums}"

    def verdict(self, name: str) -> str:
        """What comes of the operation if it is computed in the format ``name``: a key of `SEVERITY`."""
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
        """The verdict in words."""
        numbers, verdict = self.numbers, self.verdict(name)
        largest, snr = f"numbers up to {numbers.largest:.3g}", db_text(numbers.snr(name))
        flushed = numbers.flushed / max(numbers.count - numbers.zeros, 1)
        match verdict:
            case "not finite" if numbers.non_finite:
                return f"{numbers.non_finite} numbers are infinite or NaN in fp32 already"
            case "not finite":
                return f"infinite or NaN in {name}, where an input becomes 0"
            case "overflow" if numbers.faults[name] == "weight":
                return f"a weight is too large for {name}"
            case "inputs":
                return f"its inputs overflow in {name}"
            case "sum":
                sums = f"terms that add up to {numbers.partial:.3g}"
                return f"{largest}, of {sums}: overflows where a runtime adds them up in {name}"
            case "underflow":
                return f"{flushed:.0%} of the numbers become 0; {snr}"
            case "imprecise":
                return snr
            case _:
                return largest

    @property
    def is_weighted(self) -> bool:
        """Whether it multiplies with weights, and so runs in int8 by default."""
        return self.quantized is not None and self.quantized.weighted

    @property
    def is_sensitive(self) -> bool:
        """Whether it should stay in higher precision than int8."""
        return self.output_snr < MIN_INT8_SNR

    def int8_reason(self) -> str:
        """Why it loses precision in int8."""
        found = self.quantized
        assert found is not None
        schemes = {name: decibels(found.input_signal, found.input_noise[name]) for name in SCHEMES}
        best = max(schemes, key=lambda name: schemes[name])
        text = f"model outputs {db_text(self.output_snr)} with this alone in int8"
        text += f"; its input {db_text(schemes[SCHEMES[0]])}"
        if schemes[best] > schemes[SCHEMES[0]] + 3:
            text += f" ({db_text(schemes[best])} with an {best} range)"
        if found.weighted:
            text += f", channels {found.input_spread:.1f}× the median; weights {db_text(found.weight_snr)}"
            text += f", channels {found.weight_spread:.1f}×"
        return text

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
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
    """All images through the whole model in a format, compared with fp32.

    Attributes:
        name: of the format, and what is kept out of it.
        cast: whether the attention was cast too, and whatever else the model keeps in fp32.
        agreement: share of images with the same most probable class; None if the outputs are not of classes.
        snr: of the outputs in dB, as far as they are finite; of classes, their mean is taken off first.
        largest, mean: of the magnitudes of the differences.
        num_bad: outputs that are infinite or NaN.
        first: the first operation with such numbers.
        error: why it could not be run; "" if it could.
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
    """What `qtvit.doctor.examine` found.

    Attributes:
        model: its name.
        is_random: whether its weights are random, as it was given by name.
        num_params: parameters.
        data: where the images are from.
        num_images, img_size, device: on what it was examined.
        operations: in the order of the forward pass.
        runs: of the whole model.
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
        """Whether the model as it is gives finite outputs in every format."""
        return not any(run.num_bad for run in self.runs if not run.cast)

    @property
    def sensitive(self) -> list[Operation]:
        """The operations that should stay in higher precision than int8, the worst first."""
        return sorted((op for op in self.operations if op.is_sensitive), key=lambda op: op.output_snr)

    @property
    def keep(self) -> list[str]:
        """Names of the modules with `sensitive` operations: what to leave out when quantizing to int8."""
        return list(dict.fromkeys(op.site.module for op in self.sensitive))

    def layers(self) -> Mapping[str, list[Operation]]:
        """The operations by layer."""
        found: dict[str, list[Operation]] = {}
        for op in self.operations:
            found.setdefault(op.layer, []).append(op)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it: infinite numbers and NaN are the strings "inf", "-inf", "nan"."""
        fields = {name: value for name, value in vars(self).items() if name not in ("operations", "runs")}
        return _plain(
            {
                **fields,
                "torch": torch.__version__,
                "is_finite": self.is_finite,
                "keep_in_higher_precision_than_int8": self.keep,
                "runs": [asdict(run) for run in self.runs],
                "operations": [op.to_dict() for op in self.operations],
            }
        )


def worst(operations: list[Operation], name: str, cast: bool = False) -> str:
    """The worst verdict over operations in a format; without ``cast``, over those that the model does not keep."""
    verdicts = [op.verdict(name) for op in operations if op.numbers.non_finite or cast or name not in op.kept]
    return max(verdicts, key=SEVERITY.__getitem__, default="ok")


def db_text(value: float) -> str:
    """A ratio of `decibels` for readers."""
    return f"{round(value)} dB" if math.isfinite(value) else {math.inf: "exact"}.get(value, "not finite")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
