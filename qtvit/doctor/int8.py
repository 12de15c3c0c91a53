"""What 8-bit integers would make of convolutions, linear layers and matrix products.

As runtimes do it: an activation gets one scale for the whole tensor, and a range fixed beforehand on sample images;
weights are symmetric about 0, with a scale for each output channel.
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
"""The share of an activation's numbers that lie beyond a clipped range, half of them at either end."""
SCHEMES = ("asymmetric", "symmetric", "asymmetric clipped", "symmetric clipped")
"""Ways to choose the range of an activation. All computations are done in the first, which is most tools' default."""


class Operands(NamedTuple):
    """Where an operation has its factors.

    Attributes:
        activation, weight: positions of the arguments.
        chans: dimension of the activation's channels.
        out_chans: dimension of the weight's output channels.
    """

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
"""The operations that run in int8, if any do."""


class Range(NamedTuple):
    """The range of an activation.

    Attributes:
        lowest, highest: the most extreme numbers, from the outermost to the ends of the clipped range.
        channels: the largest magnitude of each channel.
    """

    lowest: Tensor
    highest: Tensor
    channels: Tensor

    def ends(self, scheme: str = SCHEMES[0]) -> tuple[float, float]:
        """The smallest and largest number that a scheme can represent; 0 is always between them."""
        at = -1 if scheme.endswith("clipped") else 0
        low, high = min(float(self.lowest[at]), 0.0), max(float(self.highest[at]), 0.0)
        bound = max(-low, high)
        return (-bound, bound) if scheme.startswith("symmetric") else (low, high)


@dataclass
class Quantized:
    """An operation in int8.

    Attributes:
        weighted: whether it multiplies with weights; if not, with another activation.
        ranges: of its activations.
        input_signal: sum of squares of its (first) activation, and ``input_noise`` of the errors, by scheme.
        signal: sum of squares of its outputs, and ``noise`` of their errors with both factors in int8.
        weight_snr: of the weights, in dB; ``tensor_weight_snr`` if one scale served all channels.
        weight_spread: largest magnitude of an output channel's weights, by the median over the channels.
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
        """Largest magnitude of a channel of the activation, by the median over the channels."""
        return _spread(self.ranges[0].channels)

    def round(self, site: Site, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the operation with both factors in int8."""
        where, rounded = OPERANDS[site.op], list(args)
        rounded[where.activation] = fake_int8(args[where.activation], *self.ranges[0].ends())
        weight = args[where.weight]
        rounded[where.weight] = (
            fake_int8_weight(weight, where.out_chans) if self.weighted else fake_int8(weight, *self.ranges[1].ends())
        )
        return tuple(rounded)


class Calibration(Tracer):
    """Finds the ranges of all activations that could run in int8: the first pass.

    Args:
        model: the model, in fp32.
        num_batches: how many batches there will be.

    Attributes:
        found: what was found, in the order of the forward pass.
    """

    def __init__(self, model: nn.Module, num_batches: int) -> None:
        super().__init__(model)
        self.found: dict[Site, Quantized] = {}
        self.weights = storages(model)
        self.num_batches = num_batches

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if where := OPERANDS.get(site.op):
            activation, weight = args[where.activation], args[where.weight]
            weighted = site.op == "convolution" or weight.untyped_storage().data_ptr() in self.weights
            ranges = [
                self._range(values, where.chans) for values in ([activation] if weighted else [activation, weight])
            ]
            found = self.found.setdefault(site, Quantized(weighted, ranges))
            if found.ranges is not ranges:
                found.ranges = [_join(a, b) for a, b in zip(found.ranges, ranges, strict=True)]
        return func(*args, **kwargs)

    def _range(self, values: Tensor, chans: int) -> Range:
        count = round(values.numel() * self.num_batches * CLIPPED / 2)
        count = min(max(count, 1), values.numel())
        flat = values.flatten()
        return Range(-(-flat).topk(count).values, flat.topk(count).values, _channels(values, chans))


class Int8Noise(Tracer):
    """Measures the error of each operation in int8, between others in fp32: the second pass."""

    def __init__(self, model: nn.Module, found: Mapping[Site, Quantized]) -> None:
        super().__init__(model)
        self.found = found

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
                _measure_weight(found, args[where.weight], where.out_chans)
        return output


class Int8(Tracer):
    """Runs the operations in ``found`` in int8, and all else in fp32."""

    def __init__(self, model: nn.Module, found: Mapping[Site, Quantized]) -> None:
        super().__init__(model)
        self.found = found

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.found.get(site)
        return func(*(found.round(site, args) if found else args), **kwargs)


def fake_int8(values: Tensor, low: float, high: float) -> Tensor:
    """Activations rounded to 256 steps from ``low`` to ``high``, one of which is 0; what is beyond is clipped."""
    scale = (high - low) / 255
    if not (math.isfinite(scale) and scale > torch.finfo(torch.float32).tiny):
        return values.clone()
    return torch.fake_quantize_per_tensor_affine(values, scale, round(-low / scale), 0, 255)


def fake_int8_weight(weight: Tensor, out_chans: int) -> Tensor:
    """Weights rounded to 255 steps that are symmetric about 0, with a range for each channel of dim ``out_chans``."""
    scale = (_channels(weight, out_chans) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, out_chans % weight.ndim, -127, 127)


def _measure_weight(found: Quantized, weight: Tensor, out_chans: int) -> None:
    channels, signal = _channels(weight, out_chans), power(weight)
    bound = float(channels.max())
    found.weight_snr = decibels(signal, power(fake_int8_weight(weight, out_chans) - weight))
    found.tensor_weight_snr = decibels(signal, power(fake_int8(weight, -bound, bound) - weight))
    found.weight_spread = _spread(channels)


def _channels(values: Tensor, dim: int) -> Tensor:
    """The largest magnitude in each channel of ``dim``."""
    return values.movedim(dim, 0).flatten(1).abs().amax(1)


def _spread(channels: Tensor) -> float:
    median = float(channels.median())
    return float(channels.max()) / median if median else math.inf


def _join(a: Range, b: Range) -> Range:
    count = max(len(a.lowest), len(b.lowest))
    lowest, highest = torch.cat([a.lowest, b.lowest]), torch.cat([a.highest, b.highest])
    return Range(-(-lowest).topk(count).values, highest.topk(count).values, torch.maximum(a.channels, b.channels))
