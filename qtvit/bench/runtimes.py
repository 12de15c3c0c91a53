"""The runtimes to measure: PyTorch in several ways, ONNX Runtime and OpenVINO.

A network is first written to a file and then opened from it, so that the memory of running it can be measured in a
process that has not converted it (`qtvit.bench.memory`).

Shapes: B batch, C channels, H x W image.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo
from qtvit.deploy.artifact import INPUT, Artifact
from qtvit.deploy.formats import DTYPES, REQUIRED, write
from qtvit.deploy.runtimes import OPENVINO_CONFIG, onnx_options
from qtvit.device import kept_signal_stack
from qtvit.errors import unknown_name

Run = Callable[[], Tensor]
"""Runs one forward pass on the images that a network was opened with; the output is in the network's precision."""


@dataclass(frozen=True)
class Runtime:
    """One way to run a network.

    Attributes:
        save: writes a network to a path, for images like the example (B, 3, H, W) and a precision.
        open: opens such a file and returns what runs it on the given fp32 images, in a precision.
        suffix: suffix of the file.
        precisions: names in `DTYPES`.
        devices: types of the devices it runs on; empty: all.
        packages: packages it needs beside PyTorch.
        why_not: why it lacks the other precisions, for error messages.
        eager: whether it runs the network's modules one after the other.
    """

    save: Callable[[nn.Module, Tensor, Path, str], None]
    open: Callable[[Path, Tensor, str], Run]
    suffix: str = ".pt"
    precisions: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    why_not: str = ""
    eager: bool = False


def check_runtimes(names: Sequence[str], precisions: Sequence[str], device: torch.device) -> None:
    """Check that all ``names`` run all ``precisions`` on ``device``, before anything is measured.

    Raises:
        ValueError: an unknown name, a precision that a runtime lacks, or a device that it does not run on.
        ModuleNotFoundError: a package that it needs is not installed.
    """
    for name in names:
        if name not in RUNTIMES:
            raise unknown_name("runtime", name, RUNTIMES)
        runtime = RUNTIMES[name]
        for precision in precisions:
            if precision not in DTYPES:
                raise unknown_name("precision", precision, DTYPES)
            if precision not in runtime.precisions:
                others = ", ".join(other for other, each in RUNTIMES.items() if precision in each.precisions)
                raise ValueError(f"{name} has no {precision}: {runtime.why_not}; {others} have")
        if runtime.devices and device.type not in runtime.devices:
            raise ValueError(f"{name} is measured on {' or '.join(runtime.devices)} alone, not on {device}")
        for package in runtime.packages:
            importlib.import_module(package)


def _save_module(model: nn.Module, images: Tensor, path: Path, precision: str) -> None:
    torch.save(copy.deepcopy(model).to("cpu", DTYPES[precision]), path)


def _load_module(path: Path, images: Tensor, precision: str) -> tuple[nn.Module, Tensor]:
    model = torch.load(path, weights_only=False)  # safe: `_save_module` has just written it
    return model.eval().to(images.device), images.to(DTYPES[precision])


def _open_eager(layout: torch.memory_format, path: Path, images: Tensor, precision: str) -> Run:
    model, pixels = _load_module(path, images, precision)
    model, pixels = model.to(memory_format=layout), pixels.to(memory_format=layout)
    return torch.inference_mode()(lambda: model(pixels))


def _open_compiled(freezing: bool, path: Path, images: Tensor, precision: str) -> Run:
    model, pixels = _load_module(path, images, precision)

    def forward(x: Tensor) -> Tensor:
        return model(x)

    # torch.compile keeps what it compiled by code object, and guards slow down with every model that shares one. So
    # every model gets a code object of its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, options={"freezing": freezing})
    run: Run = torch.no_grad()(lambda: compiled(pixels))
    run()
    return run


def _save_exported(format: str, model: nn.Module, images: Tensor, path: Path, precision: str) -> None:
    info = ModelInfo(type(model).__name__, {}, [], {"size": list(images.shape[-2:])})
    dynamic = ("batch",) if len(images) > 1 else ()
    write(copy.deepcopy(model).cpu(), Artifact(info, format, precision, dynamic), path)


def _open_onnx(path: Path, images: Tensor, precision: str) -> Run:
    import onnxruntime

    options = onnx_options(torch.get_num_threads())
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {INPUT: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _open_openvino(path: Path, images: Tensor, precision: str) -> Run:
    import openvino

    core = openvino.Core()
    with kept_signal_stack():
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in capabilities:
        raise ValueError(f"OpenVINO has no {precision} on this CPU")
    model = core.read_model(path)
    model.reshape(list(images.shape))
    config = {**OPENVINO_CONFIG, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request, feed = core.compile_model(model, "CPU", config).create_infer_request(), {INPUT: images.numpy()}
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(_save_module, partial(_open_eager, torch.preserve_format), eager=True),
    "channels_last": Runtime(_save_module, partial(_open_eager, torch.channels_last), eager=True),
    "compile": Runtime(_save_module, partial(_open_compiled, False)),
    "compile_frozen": Runtime(_save_module, partial(_open_compiled, True)),
    "onnxruntime": Runtime(
        partial(_save_exported, "onnx"),
        _open_onnx,
        ".onnx",
        precisions=("fp32", "fp16"),
        devices=("cpu",),
        packages=REQUIRED["onnx"],
        why_not="its CPU provider has no convolutions of that kind",
    ),
    "openvino": Runtime(
        partial(_save_exported, "openvino"), _open_openvino, ".xml", devices=("cpu",), packages=REQUIRED["openvino"]
    ),
}
"""Runtimes by name. "compile" is ``torch.compile`` in its default mode; "compile_frozen" adds Inductor's ``freezing``,
which treats weights as constants and folds BatchNorms. In PyTorch, half precision is ``model.to(dtype)``; for ONNX
Runtime and OpenVINO files are written as `qtvit export` writes them, for one image size."""
