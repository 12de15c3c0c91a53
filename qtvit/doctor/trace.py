"""Intercepts every operation of a forward pass, and tells where in the model it is.

Hooks on modules would not do: what overflows is often a sum of squares or of tokens within a module.
"""

import linecache
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

COPIES = {"_to_copy", "_unsafe_view", "cat", "clone", "constant_pad_nd", "copy_", "expand_copy", "flip", "gather"}
COPIES |= {"index", "index_select", "pixel_shuffle", "pixel_unshuffle", "reflection_pad2d", "repeat", "roll", "stack"}
COPIES |= {"replication_pad2d", "slice_scatter"}
"""Operations that copy numbers without computing any."""
TORCH = str(Path(torch.__file__).parent)
MAX_SOURCE = 60
"""Characters to keep of a source expression: its beginning names a function, its end what is computed last."""


class Site(NamedTuple):
    """The place of an operation in a model, the same in every forward pass.

    Attributes:
        module: name of the module whose ``forward`` runs it; "" for the model itself.
        op: its name in PyTorch's core library (ATen), the same on all devices.
        number: its index among the operations of that name in that module.
    """

    module: str
    op: str
    number: int


class Tracer(TorchDispatchMode):
    """Within this context, `visit` carries out the operations of ``model`` that compute floating-point numbers.

    Gradients have to be off, as PyTorch otherwise dispatches composite operations undivided. Fused attention is
    decomposed only with `torch.nn.attention.SDPBackend.MATH`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.is_paused = False
        self._stack: list[tuple[str, nn.Module]] = []
        """The modules whose ``forward`` is running, with their names."""
        self._count: Counter[tuple[str, str]] = Counter()
        self.hooks: list[RemovableHandle] = []

    def visit(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation that computes floating-point numbers; returns its output."""
        return func(*args, **kwargs)

    def carry_out(self, site: Site, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out any other operation, a view or a copy; returns its output."""
        return func(*args, **kwargs)

    def source(self) -> str:
        """The expression in the model's code that is being computed.

        "" in PyTorch's own layers, which have one operation each, and where there is no source.
        """
        if not self._stack or type(self._stack[-1][1]).__module__.startswith("torch.nn"):
            return ""
        frame: FrameType | None = sys._getframe()
        while frame and frame.f_code is not Tracer.__torch_dispatch__.__code__:
            frame = frame.f_back
        frame = frame and frame.f_back
        while frame and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        return _expression(frame) if frame else ""

    def __enter__(self) -> Any:
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(partial(self._enter_module, name)))
            self.hooks.append(module.register_forward_hook(self._leave_module, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._stack.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        module, op = self._stack[-1][0] if self._stack else "", func.overloadpacket.__name__
        if not _computes(func, args):
            return self.carry_out(Site(module, op, 0), func, args, kwargs)
        op = re.sub("^(native|cudnn|miopen)_|_$", "", op)  # one name for all backends, in place or not
        number = self._count[module, op]
        self._count[module, op] += 1
        return self.visit(Site(module, op, number), func, args, kwargs)

    def _enter_module(self, name: str, module: nn.Module, args: Any) -> None:
        if not self._stack:
            self._count.clear()
        self._stack.append((name, module))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


def is_float(value: Any) -> bool:
    """Whether ``value`` is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def first_output(output: Any) -> Any:
    """The result of an operation: its first output, as others are statistics."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _computes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation computes floating-point numbers from others."""
    returns = func._schema.returns
    if not returns or func.overloadpacket.__name__ in COPIES or not any(is_float(arg) for arg in args):
        return False
    alias = returns[0].alias_info
    return str(returns[0].type) == "Tensor" and (alias is None or alias.is_write)


def _expression(frame: FrameType) -> str:
    """The source of the expression that ``frame`` is computing; before Python 3.11, the whole line."""
    code, number = frame.f_code, frame.f_lineno
    text = linecache.getline(code.co_filename, number).strip()
    if hasattr(code, "co_positions"):
        first, last, start, end = list(code.co_positions())[frame.f_lasti // 2]
        if first is not None and last is not None:
            lines = [linecache.getline(code.co_filename, at).encode() for at in range(first, last + 1)]
            lines[-1] = lines[-1][:end]  # columns count bytes
            lines[0] = lines[0][start:]
            text = b"".join(lines).decode(errors="replace")
    text = re.sub(r"\s+", " ", text).strip()
    half = MAX_SOURCE // 2
    return text if len(text) <= MAX_SOURCE else f"{text[: half - 1]}…{text[-half:]}"
