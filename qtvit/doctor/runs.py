"""Running a model in every format, operation by operation and as a whole."""

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
    """Runs a model in its own dtype, and sees which operations it computes in fp32 nevertheless.

    Args:
        model: the model, converted to a dtype of 16 bits.
        everything: refuse it fp32, so that all is computed in that dtype: as if a runtime had cast the whole graph.

    Attributes:
        dtypes: of the outputs of all operations.
        first: the first operation with an output that is not finite, and where it is.
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
    """Measure all operations, and compare the whole model in every format with fp32.

    Args:
        network: in fp32 and evaluation mode, on the device of the batches.
        batches: its inputs.
    """
    with torch.no_grad(), _plain_arithmetic():
        ranges, calibration = Ranges(network), Calibration(network, len(batches))
        exact = _outputs(network, batches, ranges, "fp32")
        runs, casts, kept = [_compare("fp32", exact, exact, first=_first_bad(ranges))], [], {}
        for name in FORMATS:
            run, kept[name] = _run_cast(network, batches, exact, name)
            runs.append(run)
            if kept[name]:
                casts.append(_run_cast(network, batches, exact, name, everything=True)[0])
        _outputs(network, batches, calibration, "int8 ranges")
        found = calibration.found
        _outputs(network, batches, Int8Noise(network, found), "int8 errors")
        alone = _one_by_one(network, batches, exact, found)
        layers = layer_names(network)
        operations = tuple(
            Operation(
                layers[site.module],
                site,
                numbers,
                frozenset(name for name in FORMATS if site in kept[name] or site.op == RELEASED),
                found.get(site),
                alone.get(site, math.inf),
            )
            for site, numbers in ranges.numbers.items()
        )
        weighted = {site: one for site, one in found.items() if one.weighted}
        sensitive = {op.site for op in operations if op.is_sensitive} & set(weighted)
        if weighted:
            runs.append(_run_int8(network, batches, exact, "int8", weighted))
        if sensitive:
            name = f"int8 but for {len(sensitive)} layer{'s' * (len(sensitive) > 1)}"
            rest = {site: one for site, one in weighted.items() if site not in sensitive}
            runs.append(_run_int8(network, batches, exact, name, rest))
        if len(weighted) < len(found):
            casts.append(_run_int8(network, batches, exact, "int8", found, everything=True))
    return operations, (*runs, *casts)


def layer_names(network: nn.Module) -> dict[str, str]:
    """For each module, the layer that its operations are reported with.

    A convolution or linear layer is one with the norm and the activation around it, if all are parts of a module that
    has no others; any other module is a layer of its own.
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
    """The model in 16 bits, and the operations that it computes in fp32 nevertheless."""
    converted = copy.deepcopy(network).to(FORMATS[name])
    cast = Cast(converted, everything)
    try:
        desc = f"{name}, all of it" if everything else name
        outputs = _outputs(converted, batches, cast, desc, FORMATS[name])
    except (RuntimeError, NotImplementedError) as error:  # PyTorch may lack an operation for a dtype on a device
        return Run(name, everything, error=str(error).splitlines()[0]), set()
    kept = {site for site, dtype in cast.dtypes.items() if dtype != FORMATS[name]}
    return _compare(name, exact, outputs, everything, cast.first), kept


def _run_int8(
    network: nn.Module,
    batches: Sequence[Tensor],
    exact: Tensor,
    name: str,
    found: Mapping[Site, Quantized],
    everything: bool = False,
) -> Run:
    """The model with the operations in ``found`` in int8."""
    return _compare(name, exact, _outputs(network, batches, Int8(network, found), name), everything)


def _one_by_one(
    network: nn.Module, batches: Sequence[Tensor], exact: Tensor, found: Mapping[Site, Quantized]
) -> dict[Site, float]:
    """The signal-to-noise ratio of the outputs, in dB, with each operation alone in int8."""
    result = {}
    for site, one in console.progress(found.items(), total=len(found), desc="int8, one by one", unit="op"):
        with console.quiet():
            result[site] = _output_snr(exact, _outputs(network, batches, Int8(network, {site: one}), ""))
    return result


def _outputs(
    network: nn.Module, batches: Sequence[Tensor], tracer: Tracer, desc: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the network gives for all batches as ``dtype``, seen by ``tracer``: on the CPU, in fp32."""
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
    """In dB; what the logits of all classes have in common is no signal."""
    signal = exact - exact.mean(1, keepdim=True) if _are_logits(exact) else exact
    return decibels(power(signal), power(outputs - exact))


def _are_logits(outputs: Tensor) -> bool:
    return outputs.ndim == 2 and outputs.shape[1] > 1


def _first_bad(ranges: Ranges) -> str:
    """The first operation whose numbers are not finite in fp32."""
    bad = ((site, numbers) for site, numbers in ranges.numbers.items() if numbers.non_finite and site.op != RELEASED)
    return next((_place(site, numbers.source) for site, numbers in bad), "")


def _cast_constant(value: Any, dtype: torch.dtype) -> Any:
    """A number in the code, infinite if it is too large for ``dtype``."""
    if isinstance(value, float) and dtype in FORMATS.values() and abs(value) > torch.finfo(dtype).max:
        return math.copysign(math.inf, value)
    return value


def _place(site: Site, source: str) -> str:
    return f"{site.module}: {source or site.op}".removeprefix(": ")


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """fp32 that is fp32 on a GPU too; and of fused attention the products and the softmax that exporters make of it, in
    the model's dtype.
    """
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
