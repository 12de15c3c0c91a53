"""Runs a model in every format, measuring each operation and comparing the outputs with fp32."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from qtvit import console

from .int8 import Calibration, Int8, Int8Noise, Quantized
from .measure import FORMATS, RELEASED, Ranges, decibels, power
from .report import Operation, Run
from .trace import Site, Tracer, first_output, is_float


class Cast(Tracer):
    """Runs a model that was converted to 16 bits, and records which operations it still computes in fp32.

    With ``everything``, casts to fp32 are ignored and all is computed in 16 bits, as if a runtime had cast the whole
    graph.

    Attributes:
        dtypes: dtype of the output of each operation.
        first: the first operation with an output that is not finite; "" if there is none.
    """

    def __init__(self, model: nn.Module, everything: bool = False) -> None:
        super().__init__(model)
        self.everything = everything
        self.dtypes: dict[Site, torch.dtype] = {}
        self.first = ""

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.everything:
            dtype = next(arg.dtype for arg in args if is_float(arg))
            args, kwargs = tree_map(partial(_cast_constant, dtype=dtype), (args, kwargs))
        output = func(*args, **kwargs)
        self.dtypes[site] = first_output(output).dtype
        return self._check(site, output)

    def carry_out(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_upcast = site.op == "_to_copy" and kwargs.get("dtype") == torch.float32
        if self.everything and is_upcast and args[0].dtype in FORMATS.values():
            return args[0].clone()
        return self._check(site, func(*args, **kwargs))

    def _check(self, site: Site, output: Any) -> Any:
        values = first_output(output)
        if not self.first and is_float(values) and values.numel() and not values.abs().max().isfinite():
            self.first = _place(site, self.source())
        return output


def run_all(network: nn.Module, batches: Sequence[Tensor]) -> tuple[tuple[Operation, ...], tuple[Run, ...]]:
    """Measure all operations of ``network``, and compare the whole network in every format with fp32.

    The network has to be in fp32 and evaluation mode, on the device of its inputs ``batches``.
    """

    def in_int8(name: str, found: Mapping[Site, Quantized], everything: bool = False) -> Run:
        return _compare(name, exact, _outputs(network, batches, Int8(network, found), name), everything)

    with torch.no_grad(), _plain_arithmetic():
        ranges, calibration = Ranges(network), Calibration(network, len(batches))
        exact = _outputs(network, batches, ranges, "fp32")
        measured = ranges.numbers.items()
        bad = [_place(site, n.source) for site, n in measured if n.non_finite and site.op != RELEASED]
        runs, casts, kept = [_compare("fp32", exact, exact, first=bad[0] if bad else "")], [], {}
        for name in FORMATS:
            run, kept[name] = _run_cast(network, batches, exact, name)
            runs.append(run)
            if kept[name]:
                casts.append(_run_cast(network, batches, exact, name, everything=True)[0])
        _outputs(network, batches, calibration, "int8 ranges")
        found = calibration.found
        _outputs(network, batches, Int8Noise(network, found), "int8 errors")
        alone = {}
        for site, one in console.progress(found.items(), total=len(found), desc="int8, one by one", unit="op"):
            with console.quiet():
                alone[site] = _output_snr(exact, _outputs(network, batches, Int8(network, {site: one}), ""))
        layers = layer_names(network)
        operations = []
        for site, numbers in measured:
            in_fp32 = frozenset(name for name in FORMATS if site in kept[name] or site.op == RELEASED)
            output_snr = alone.get(site, math.inf)
            operations.append(Operation(layers[site.module], site, numbers, in_fp32, found.get(site), output_snr))
        weighted = {site: one for site, one in found.items() if one.weighted}
        sensitive = {op.site for op in operations if op.is_sensitive} & set(weighted)
        if weighted:
            runs.append(in_int8("int8", weighted))
        if sensitive:
            name = f"int8 but for {len(sensitive)} layer{'s' * (len(sensitive) > 1)}"
            runs.append(in_int8(name, {site: one for site, one in weighted.items() if site not in sensitive}))
        if len(weighted) < len(found):
            casts.append(in_int8("int8", found, everything=True))
    return tuple(operations), (*runs, *casts)


def layer_names(network: nn.Module) -> dict[str, str]:
    """By module name, the name of the layer that the module's operations are reported under.

    A convolution or linear layer forms one layer with the norm and the activation around it, if their parent module
    consists of these only; any other module is a layer of its own.
    """
    names: dict[str, str] = {}
    for path, _ in network.named_modules():
        parent = path.rpartition(".")[0]
        siblings = list(network.get_submodule(parent).children()) if path else []
        is_simple = not any(list(sibling.children()) for sibling in siblings)
        num_matrices = sum(any(p.ndim > 1 for p in sibling.parameters()) for sibling in siblings)
        names[path] = names[parent] if parent and is_simple and num_matrices == 1 else path
    return names


def _run_cast(
    network: nn.Module, batches: Sequence[Tensor], exact: Tensor, name: str, everything: bool = False
) -> tuple[Run, set[Site]]:
    """The run of the model in a format of 16 bits, and the operations that it still computes in fp32."""
    converted = copy.deepcopy(network).to(FORMATS[name])
    cast = Cast(converted, everything)
    try:
        desc = f"{name}, all of it" if everything else name
        outputs = _outputs(converted, batches, cast, desc, FORMATS[name])
    except (RuntimeError, NotImplementedError) as error:  # PyTorch may lack an operation for a dtype on a device
        return Run(name, everything, error=str(error).splitlines()[0]), set()
    kept = {site for site, dtype in cast.dtypes.items() if dtype != FORMATS[name]}
    return _compare(name, exact, outputs, everything, cast.first), kept


def _outputs(
    network: nn.Module, batches: Sequence[Tensor], tracer: Tracer, desc: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The network's outputs for all batches as ``dtype``, within the context of ``tracer``; in fp32 on the CPU."""
    outputs = []
    with tracer:
        for batch in console.progress(batches, desc=desc, unit="batch"):
            output = network(batch.to(dtype))
            if not isinstance(output, Tensor):
                kind = f"{type(network).__name__} gives a {type(output).__name__}"
                raise ValueError(f"{kind}; models that give a single tensor can be examined")
            outputs.append(output.float().cpu())
    return torch.cat(outputs)


def _compare(name: str, exact: Tensor, outputs: Tensor, cast: bool = False, first: str = "") -> Run:
    num_bad = outputs.numel() - int(outputs.isfinite().sum())
    fine = (outputs.isfinite() & exact.isfinite()).reshape(len(outputs), -1).all(1)
    agreement = None
    if _are_logits(exact):
        agreement = float(((exact.argmax(1) == outputs.argmax(1)) & fine).float().mean())
    if not fine.any():
        return Run(name, cast, agreement, num_bad=num_bad, first=first)
    error = (outputs[fine] - exact[fine]).abs()
    snr = _output_snr(exact[fine], outputs[fine])
    return Run(name, cast, agreement, snr, float(error.max()), float(error.mean()), num_bad, first)


def _output_snr(exact: Tensor, outputs: Tensor) -> float:
    """Signal-to-noise ratio in dB; the mean over the classes does not count as signal, as it does not matter."""
    signal = exact - exact.mean(1, keepdim=True) if _are_logits(exact) else exact
    return decibels(power(signal), power(outputs - exact))


def _are_logits(outputs: Tensor) -> bool:
    return outputs.ndim == 2 and outputs.shape[1] > 1


def _cast_constant(value: Any, dtype: torch.dtype) -> Any:
    """A constant of the model's code in ``dtype``: infinite if it is too large."""
    if isinstance(value, float) and dtype in FORMATS.values() and abs(value) > torch.finfo(dtype).max:
        return math.copysign(math.inf, value)
    return value


def _place(site: Site, source: str) -> str:
    return f"{site.module}: {source or site.op}".removeprefix(": ")


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Within this context fp32 is not TF32, and fused attention runs as products and softmax in the model's dtype."""
    cuda = torch.backends.cuda
    before = cuda.fp16_bf16_reduction_math_sdp_allowed(), cuda.matmul.allow_tf32
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    cuda.matmul.allow_tf32 = False
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before[0])
        cuda.matmul.allow_tf32 = before[1]
