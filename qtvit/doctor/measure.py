"""The numbers that each operation gives in fp32, and their errors in fp16 and bf16."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qtvit.layers import MultiScaleAttention

from .trace import Site, Tracer, first_output, is_float

FP16 = torch.finfo(torch.float16)
FP16_TO_ZERO = FP16.smallest_normal * FP16.eps / 2
"""The largest magnitude that fp16 rounds to 0: half of its smallest number."""
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
RELEASED = "released"
"""Name of the operation Σx² over a token: the released code divides tokens by their length first, ours does not."""


@dataclass
class Numbers:
    """The numbers that an operation gives over all images.

    Attributes:
        source: the expression in the model's code, see `Tracer.source`.
        terms: number of terms that each output sums; 0 if it is no sum.
        low, high: the smallest and largest finite number.
        smallest: the smallest magnitude above 0; inf if there is none.
        partial: the largest Σ|terms|, an upper bound of partial sums in any order; 0 if it is no sum.
        count, zeros: how many numbers there are, and how many of them are 0.
        flushed, subnormal: how many numbers other than 0 fp16 rounds to 0, and how many are below its normal range, so
            that it keeps fewer digits or none.
        non_finite: how many are infinite or NaN.
        signal: sum of squares.
        noise: by format, the sum of squared errors of the operation with its inputs and output rounded.
        faults: by format, why outputs are infinite or NaN: an "output", "weight" or "input" is too large, or an input
            becomes "zero"; "" if all are finite.
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
        """The largest magnitude; inf if any number is not finite."""
        return math.inf if self.non_finite else max(abs(self.low), abs(self.high)) if self.count else 0.0

    def snr(self, name: str) -> float:
        """Signal-to-noise ratio of the operation in the format ``name``, in dB, see `decibels`."""
        return decibels(self.signal, self.noise[name])

    def add(self, values: Tensor) -> None:
        """Add the outputs of another batch."""
        self.count += values.numel()
        self.signal += power(values)
        if not values.isfinite().all():
            self.non_finite += values.numel() - int(values.isfinite().sum())
            values = values[values.isfinite()]
        if not values.numel():
            return
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
    """Measures every operation of a model in fp32, and the one that only the released code has (`RELEASED`).

    ``numbers`` has the operations in the order of the forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.numbers: dict[Site, Numbers] = {}
        self.weights = storages(model)

    def __enter__(self) -> Any:
        for name, module in self.model.named_modules():
            if isinstance(module, MultiScaleAttention) and module.kernel == "taylor2":
                self.hooks.append(module.register_forward_pre_hook(partial(self._measure_released, name)))
        return super().__enter__()

    def _measure_released(self, name: str, module: MultiScaleAttention, args: tuple[Tensor]) -> None:
        self.is_paused = True
        for number, (tokens, letter) in enumerate(zip(module.tokens(args[0]), "qk", strict=False)):
            site = Site(name, RELEASED, number)
            source = f"‖{letter}‖² of the tokens, as the released code has it"
            self.numbers.setdefault(site, Numbers(source, terms=tokens.shape[-2]))
            self.visit(site, _square_sum, (tokens,), {})
        self.is_paused = False

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site not in self.numbers:
            self.numbers[site] = Numbers(self.source())
        found = self.numbers[site]
        # The trials come before the operation itself, which may overwrite its inputs.
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
        """The kind of the first input that is too large for ``dtype``: "weight" or "input"; "" if none is."""
        largest = torch.finfo(dtype).max
        for arg in args:
            if is_float(arg) and arg.numel() and not float(arg.abs().max()) <= largest:
                return "weight" if arg.untyped_storage().data_ptr() in self.weights else "input"
        return ""


def storages(model: nn.Module) -> set[int]:
    """Addresses of a model's parameters and buffers, to recognise views of them."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): 40 dB is a relative error of 1 %. inf without noise, -inf if noise is not finite."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def power(values: Tensor) -> float:
    """The sum of squares, even if it is outside the range of fp32; not finite if a value is not."""
    norm = float(torch.linalg.vector_norm(values))
    if norm == 0 or not math.isfinite(norm):  # also if squares underflow or overflow
        scale = _largest(values)
        if scale == 0 or not math.isfinite(scale):
            return scale
        norm = float(torch.linalg.vector_norm(values / scale)) * scale
    return norm**2


def as_format(values: Any, dtype: torch.dtype) -> Any:
    """Arguments of an operation with tensors rounded to ``dtype``, as fp32."""
    return tree_map(lambda value: value.to(dtype).float() if is_float(value) else value, values)


def _of_products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σ|a b| of a convolution or matrix product: the same operation on the magnitudes."""
    magnitudes = tree_map(lambda value: value.abs() if is_float(value) else value, args)
    first, second = [arg for arg in args if is_float(arg) and arg.ndim > 1][-2:]
    terms = second[0].numel() if func.overloadpacket.__name__ == "convolution" else first.shape[-1]
    return terms, _largest(func(*magnitudes, **kwargs))


def _of_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σ|x| of a sum, or of a mean before the division."""
    sums = func(args[0].abs(), *args[1:], **kwargs)
    terms = args[0].numel() // max(sums.numel(), 1)
    return terms, _largest(sums) * (1 if func.overloadpacket.__name__ == "sum" else terms)


def _of_squares(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σx² of a layer norm, which runtimes that decompose it compute in the format itself."""
    return math.prod(args[1]), _largest(args[0].square().sum(tuple(range(-len(args[1]), 0))))


def _of_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, float]:
    """Σx² of a Euclidean norm."""
    norms = func(*args, **kwargs)
    is_euclidean = len(args) < 2 or args[1] == 2
    return args[0].numel() // max(norms.numel(), 1), _largest(norms) ** 2 if is_euclidean else 0.0


def _square_sum(tokens: Tensor) -> Tensor:
    """‖x‖² over the D channels of tokens (B, heads, D, N)."""
    return tokens.square().sum(-2)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


SUMS: dict[str, Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[int, float]]] = {
    **dict.fromkeys(("convolution", "mm", "bmm", "addmm", "baddbmm"), _of_products),
    **dict.fromkeys(("sum", "mean", "_adaptive_avg_pool2d"), _of_numbers),
    "linalg_vector_norm": _of_norm,
    "layer_norm": _of_squares,
}
"""Operations that sum many terms: (func, args, kwargs) -> number of terms and largest sum of their magnitudes."""
