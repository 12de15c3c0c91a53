"""What each operation's numbers look like in fp32, and what fp16 and bf16 would make of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qtvit.layers import MultiScaleAttention

from .trace import Site, Tracer, first_output, is_float

FP16 = torch.finfo(torch.float16)
FP16_TO_ZERO = FP16.smallest_normal * FP16.eps / 2
"""The largest magnitude that fp16 makes 0 of: half of its smallest number."""
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
RELEASED = "released"
"""Name of an operation that the authors' code has and ours does without: tokens are divided by their length first."""


@dataclass
class Numbers:
    """The numbers that an operation has given, over all images.

    Attributes:
        source: the expression of the model's code, see `Tracer.source`.
        terms: how many products or numbers each output sums; 0: it is no sum.
        low, high: smallest and largest of the finite ones.
        smallest: smallest magnitude above 0; inf if there is none.
        partial: the largest Σ|terms|, above which no partial sum can get, in whatever order; 0: it is no sum.
        count, zeros: how many there are, and how many are 0.
        flushed, subnormal: how many fp16 makes 0 of, and how many it keeps with fewer digits, or not at all, as they
            are below its normal range.
        non_finite: how many are infinite or NaN.
        signal: sum of their squares.
        noise: by format, the sum of squared errors of the operation on rounded inputs, with its output rounded.
        faults: by format, what makes its outputs infinite or NaN: "output", "weight" or "input" is too large, or an
            input becomes "zero"; "" if nothing does.
    """

    source: str = ""
    terms: int = 0
    low: float = math.inf
    high: float = -math.inf
    smallest: float = math.inf
    partial: float = 0.0
    count: int = 0
    zeros: int = 0
    flushed: int = 0
    subnormal: int = 0
    non_finite: int = 0
    signal: float = 0.0
    noise: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FORMATS, 0.0))
    faults: dict[str, str] = field(default_factory=lambda: dict.fromkeys(FORMATS, ""))

    @property
    def largest(self) -> float:
        """The largest magnitude; inf if one is not finite."""
        return math.inf if self.non_finite else max(abs(self.low), abs(self.high)) if self.count else 0.0

    def snr(self, name: str) -> float:
        """Signal-to-noise ratio in dB of the operation in that format, see `decibels`."""
        return decibels(self.signal, self.noise[name])

    def add(self, values: Tensor) -> None:
        """Take in another batch."""
        if not values.numel():
            return
        self.count += values.numel()
        self.signal += power(values)
        low, high = map(float, values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[values.isfinite()]
            self.non_finite += values.numel() - finite.numel()
            if not finite.numel():
                return
            values = finite
            low, high = map(float, values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        magnitudes = values.abs()
        zeros = values.numel() - int(values.count_nonzero())
        self.zeros += zeros
        self.flushed += int((magnitudes <= FP16_TO_ZERO).sum()) - zeros
        self.subnormal += int((magnitudes < FP16.smallest_normal).sum()) - zeros
        if zeros:
            magnitudes = magnitudes.masked_fill_(magnitudes == 0, math.inf)
        self.smallest = min(self.smallest, float(magnitudes.min()))


class Ranges(Tracer):
    """Measures every operation of a model that runs in fp32, and what the released code would do in its place.

    Attributes:
        numbers: what was found, in the order of the forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.numbers: dict[Site, Numbers] = {}
        self.weights = storages(model)

    def __enter__(self) -> Any:
        for name, module in self.model.named_modules():
            if isinstance(module, MultiScaleAttention) and module.kernel == "taylor2":
                self.hooks.append(module.register_forward_pre_hook(self._released(name)))
        return super().__enter__()

    def _released(self, name: str) -> Any:
        def measure(module: MultiScaleAttention, args: tuple[Tensor]) -> None:
            self.is_paused = True
            q, k, _ = module.tokens(args[0])
            for number, (tokens, letter) in enumerate(((q, "q"), (k, "k"))):
                site = Site(name, RELEASED, number)
                source = f"‖{letter}‖² of the tokens, as the released code has it"
                self.numbers.setdefault(site, Numbers(source, terms=tokens.shape[-2]))
                self.visit(site, _square_sum, (tokens,), {})
            self.is_paused = False

        return measure

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.numbers.get(site)
        if found is None:
            found = self.numbers[site] = Numbers(self.source())
        # All that is only tried out comes first, as the operation may overwrite its inputs.
        tried = {
            name: first_output(func(*as_format(args, dtype), **as_format(kwargs, dtype))).to(dtype).float()
            for name, dtype in FORMATS.items()
        }
        bad_inputs = {name: self._bad_input(args, dtype) for name, dtype in FORMATS.items()}
        if bound := SUMS.get(site.op):
            found.terms, partial = bound(func, args, kwargs)
            found.partial = max(found.partial, partial)
        output = func(*args, **kwargs)
        exact, num_bad = first_output(output), found.non_finite
        found.add(exact)
        for name, rounded in tried.items():
            noise = power(rounded.sub_(exact))
            found.noise[name] += noise
            if not math.isfinite(noise) and found.non_finite == num_bad and found.faults[name] in ("", "input"):
                is_too_large = float(exact.abs().max()) > torch.finfo(FORMATS[name]).max
                found.faults[name] = bad_inputs[name] or ("output" if is_too_large else "zero")
        return output

    def _bad_input(self, args: tuple[Any, ...], dtype: torch.dtype) -> str:
        """Which input is too large for ``dtype``: "weight", "input", or ""."""
        largest = torch.finfo(dtype).max
        for arg in args:
            if is_float(arg) and arg.numel() and not float(arg.abs().max()) <= largest:
                return "weight" if arg.untyped_storage().data_ptr() in self.weights else "input"
        return ""


def storages(model: nn.Module) -> set[int]:
    """Where the parameters and buffers of a model are in memory, by which views of them are recognised."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): 40 dB is a relative error of 1 %. inf: no error at all; -inf: not finite."""
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def power(values: Tensor) -> float:
    """The sum of squares, beyond fp32's own range too; not finite if the values are not."""
    norm = float(torch.linalg.vector_norm(values))
    if norm == 0 or not math.isfinite(norm):
        scale = float(values.abs().max()) if values.numel() else 0.0
        if scale == 0 or not math.isfinite(scale):
            return scale
        norm = float(torch.linalg.vector_norm(values / scale)) * scale
    return norm**2


def as_format(values: Any, dtype: torch.dtype) -> Any:
    """Arguments of an operation, tensors rounded to ``dtype`` and given as fp32."""
    return tree_map(lambda value: value.to(dtype).float() if is_float(value) else value, values)


Bound = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[int, float]]


def _of_products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σ|a b| of a convolution or matrix product: it of the magnitudes."""
    magnitudes = tree_map(lambda value: value.abs() if is_float(value) else value, args)
    first, second = [arg for arg in args if is_float(arg) and arg.ndim > 1][-2:]
    is_convolution = func.overloadpacket.__name__ == "convolution"
    terms = second[0].numel() if is_convolution else first.shape[-1]
    return terms, _largest(func(*magnitudes, **kwargs))


def _of_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σ|x| of a sum, or of a mean before its division."""
    sums = func(args[0].abs(), *args[1:], **kwargs)
    terms = args[0].numel() // max(sums.numel(), 1)
    return terms, _largest(sums) * (1 if func.overloadpacket.__name__ == "sum" else terms)


def _of_squares(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σx² over the dimensions of a layer norm, which runtimes that take it apart compute as written."""
    dims = tuple(range(-len(args[1]), 0))
    return math.prod(args[1]), _largest(args[0].square().sum(dims))


def _of_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σx² of a Euclidean norm."""
    norms = func(*args, **kwargs)
    is_euclidean = len(args) < 2 or args[1] == 2
    return args[0].numel() // max(norms.numel(), 1), _largest(norms) ** 2 if is_euclidean else 0.0


def _square_sum(tokens: Tensor) -> Tensor:
    """‖x‖² over D of (B, heads, D, N) tokens."""
    return tokens.square().sum(-2)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


SUMS: dict[str, Bound] = {
    **dict.fromkeys(("convolution", "mm", "bmm", "addmm", "baddbmm"), _of_products),
    **dict.fromkeys(("sum", "mean", "_adaptive_avg_pool2d"), _of_numbers),
    "linalg_vector_norm": _of_norm,
    "layer_norm": _of_squares,
}
"""The operations that add up many terms: (func, args, kwargs) -> how many, and the largest sum of their magnitudes."""
