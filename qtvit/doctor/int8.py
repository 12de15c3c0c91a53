"""Errors of convolutions, linear layers and matrix products in int8, simulated in fp32.

As in common runtimes, an activation has one scale for the whole tensor and a range that is fixed beforehand on sample
images; weights are symmetric about 0, with a scale for each output channel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .measure import decibels, power, storages
from .trace import Site, Tracer, first_output

CLIPPED = 1e-4
"""Fraction of an activation's numbers outside a clipped range, half of them at either end."""
SCHEMES = ("asymmetric", "symmetric", "asymmetric clipped", "symmetric clipped")
"""Ways to choose the range of an activation. The first, most tools' default, is the one to compute with."""


class Operands(NamedTuple):
    """Argument positions of an operation's two factors, and the dimension of the channels in each."""

    activation: int
    weight: int
    chans: int
    out_chans: int


OPERANDS = {
    "convolution": Operands(0, 1, 1, 0),
    "mm": Operands(0, 1, -1, -1),
    "addmm": Operands(1, 2, -1, -1),
    "bmm": Operands(0, 1, -1, -1),
    "baddbmm": Operands(1, 2, -1, -1),
}
"""The operations that can run in int8, by their names in ATen."""


class Range(NamedTuple):
    """The range of an activation.

    Attributes:
        lowest, highest: the most extreme numbers, from the outermost one to the end of the clipped range.
        channels: the largest magnitude in each channel.
    """

    lowest: Tensor
    highest: Tensor
    channels: Tensor

    def ends(self, scheme: str = SCHEMES[0]) -> tuple[float, float]:
        """The smallest and largest number that ``scheme`` can represent; 0 always lies between them."""
        at = -1 if scheme.endswith("clipped") else 0
        low, high = min(float(self.lowest[at]), 0.0), max(float(self.highest[at]), 0.0)
        bound = max(-low, high)
        return (-bound, bound) if scheme.startswith("symmetric") else (low, high)


@dataclass
class Quantized:
    """An operation in int8.

    Attributes:
        weighted: whether the second factor is a weight; otherwise it is another activation.
        ranges: ranges of its activations.
        input_signal, input_noise: sums of squares of its first activation and, by scheme, of the rounding errors.
        signal, noise: sums of squares of its outputs, and of their errors with both factors in int8.
        weight_snr, tensor_weight_snr: dB of the weights rounded with a scale per channel, and with one for all.
        weight_spread: largest magnitude of an output channel's weights divided by the median over the channels.
    """

    weighted: bool
    ranges: list[Range]
    input_signal: float = 0.0
    input_noise: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SCHEMES, 0.0))
    signal: float = 0.0
    noise: float = 0.0
    weight_snr: float = math.inf
    tensor_weight_snr: float = math.inf
    weight_spread: float = 1.0

    @property
    def input_spread(self) -> float:
        """Largest magnitude of a channel of the activation divided by the median over the channels."""
        return _spread(self.ranges[0].channels)

    def round(self, site: Site, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the operation with both factors rounded to int8."""
        at, rounded = OPERANDS[site.op], list(args)
        rounded[at.activation] = fake_int8(args[at.activation], *self.ranges[0].ends())
        if self.weighted:
            rounded[at.weight] = fake_int8_weight(args[at.weight], at.out_chans)
        else:
            rounded[at.weight] = fake_int8(args[at.weight], *self.ranges[1].ends())
        return tuple(rounded)


class Calibration(Tracer):
    """First pass: finds the ranges of all activations of operations that could run in int8.

    ``num_batches`` is the number of batches to come; ``found`` has the operations in the order of the forward pass.
    """

    def __init__(self, model: nn.Module, num_batches: int) -> None:
        super().__init__(model)
        self.found: dict[Site, Quantized] = {}
        self.weights = storages(model)
        self.num_batches = num_batches

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if where := OPERANDS.get(site.op):
            weight = args[where.weight]
            weighted = site.op == "convolution" or weight.untyped_storage().data_ptr() in self.weights
            activations = [args[where.activation]] if weighted else [args[where.activation], weight]
            ranges = [self._range(values, where.chans) for values in activations]
            found = self.found.setdefault(site, Quantized(weighted, ranges))
            if found.ranges is not ranges:
                found.ranges = [_join(a, b) for a, b in zip(found.ranges, ranges, strict=True)]
        return func(*args, **kwargs)

    def _range(self, values: Tensor, chans: int) -> Range:
        count = round(values.numel() * self.num_batches * CLIPPED / 2)
        count, flat = min(max(count, 1), values.numel()), values.flatten()
        return Range(-(-flat).topk(count).values, flat.topk(count).values, _channels(values, chans))


class Int8(Tracer):
    """Runs the operations in ``found`` in int8, and all others in fp32."""

    def __init__(self, model: nn.Module, found: Mapping[Site, Quantized]) -> None:
        super().__init__(model)
        self.found = found

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.found.get(site)
        return func(*(found.round(site, args) if found else args), **kwargs)


class Int8Noise(Int8):
    """Second pass: measures the error of each operation in ``found`` in int8 while the model runs in fp32."""

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        if found := self.found.get(site):
            where, exact = OPERANDS[site.op], first_output(output)
            found.signal += power(exact)
            found.noise += power(first_output(func(*found.round(site, args), **kwargs)) - exact)
            activation = args[where.activation]
            found.input_signal += power(activation)
            for scheme in SCHEMES:
                found.input_noise[scheme] += power(fake_int8(activation, *found.ranges[0].ends(scheme)) - activation)
            if found.weighted:
                weight = args[where.weight]
                channels, signal = _channels(weight, where.out_chans), power(weight)
                bound = float(channels.max())
                found.weight_snr = decibels(signal, power(fake_int8_weight(weight, where.out_chans) - weight))
                found.tensor_weight_snr = decibels(signal, power(fake_int8(weight, -bound, bound) - weight))
                found.weight_spread = _spread(channels)
        return output


def fake_int8(values: Tensor, low: float, high: float) -> Tensor:
    """Activations rounded to 256 steps from ``low`` to ``high``, one of which is 0; numbers outside are clipped."""
    scale = (high - low) / 255
    if not (math.isfinite(scale) and scale > torch.finfo(torch.float32).tiny):
        return values.clone()
    return torch.fake_quantize_per_tensor_affine(values, scale, round(-low / scale), 0, 255)


def fake_int8_weight(weight: Tensor, out_chans: int) -> Tensor:
    """Weights rounded to 255 steps symmetric about 0, with a range for each channel of dimension ``out_chans``."""
    scale = (_channels(weight, out_chans) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, out_chans % weight.ndim, -127, 127)


def _channels(values: Tensor, dim: int) -> Tensor:
    """The largest magnitude in each channel of dimension ``dim``."""
    return values.movedim(dim, 0).flatten(1).abs().amax(1)


def _spread(channels: Tensor) -> float:
    median = float(channels.median())
    return float(channels.max()) / median if median else math.inf


def _join(a: Range, b: Range) -> Range:
    count = max(len(a.lowest), len(b.lowest))
    lowest, highest = torch.cat([a.lowest, b.lowest]), torch.cat([a.highest, b.highest])
    return Range(-(-lowest).topk(count).values, highest.topk(count).values, torch.maximum(a.channels, b.channels))
