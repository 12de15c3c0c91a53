"""What runs a network that is measured: PyTorch in three ways, ONNX Runtime, OpenVINO.

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
"""One forward pass of the images a network was opened with; its output is in the precision that was asked for."""


@dataclass(frozen=True)
class Runtime:
    """One way to run a network.

    Attributes:
        save: writes a network that takes images (B, 3, H, W) like the example's to a path, for a precision.
        open: what runs such a file on images of fp32, in a precision.
        suffix: of the file.
        precisions: names in `DTYPES`.
        devices: types of devices it runs on; empty: all.
        packages: what it needs beside PyTorch.
        why_not: why it has no other precisions.
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
    """See that all can be measured, before any is.

    Raises:
        ValueError: an unknown name, a precision that a runtime does not have, or another device than it runs on.
        ModuleNotFoundError: a package that is not installed.
    """
    for name in names:
        if name not in RUNTIMES:
            raise unknown_name("runtime", name, RUNTIMES)
        runtime = RUNTIMES[name]
        for precision in precisions:
            if precision not in DTYPES:
                raise unknown_name("precision", precision, DTYPES)
            if precision not in runtime.precisions:
                raise ValueError(f"{name} has no {precision}: {runtime.why_not}; {_others(precision)} have")
        if runtime.devices and device.type not in runtime.devices:
            raise ValueError(f"{name} is measured on {' or '.join(runtime.devices)} alone, not on {device}")
        for package in runtime.packages:
            importlib.import_module(package)


def _others(precision: str) -> str:
    return ", ".join(name for name, runtime in RUNTIMES.items() if precision in runtime.precisions)


def _save_module(model: nn.Module, images: Tensor, path: Path, precision: str) -> None:
    torch.save(copy.deepcopy(model).to("cpu", DTYPES[precision]), path)


def _load_module(path: Path, images: Tensor, precision: str) -> tuple[nn.Module, Tensor]:
    model = torch.load(path, weights_only=False)  # written here a moment ago
    return model.eval().to(images.device), images.to(DTYPES[precision])


def _open_eager(path: Path, images: Tensor, precision: str) -> Run:
    model, pixels = _load_module(path, images, precision)
    return torch.inference_mode()(lambda: model(pixels))


def _open_channels_last(path: Path, images: Tensor, precision: str) -> Run:
    model, pixels = _load_module(path, images, precision)
    model, pixels = model.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: model(pixels))


def _open_compiled(path: Path, images: Tensor, precision: str, freezing: bool = False) -> Run:
    model, pixels = _load_module(path, images, precision)

    def forward(x: Tensor) -> Tensor:
        return model(x)

    # What the compiler makes is looked up by the code of the function; with code of its own, no model pays for others.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, options={"freezing": freezing})
    run: Run = torch.no_grad()(lambda: compiled(pixels))
    run()
    return run


def _open_frozen(path: Path, images: Tensor, precision: str) -> Run:
    return _open_compiled(path, images, precision, freezing=True)


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
    "eager": Runtime(_save_module, _open_eager, eager=True),
    "channels_last": Runtime(_save_module, _open_channels_last, eager=True),
    "compile": Runtime(_save_module, _open_compiled),
    "compile_frozen": Runtime(_save_module, _open_frozen),
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
"""By the name that the command takes. "compile" is ``torch.compile`` in its default mode; "compile_frozen" the same
with Inductor's ``freezing``, which takes weights for constants and folds BatchNorms. Half precisions are
``model.to(dtype)``. For the others files are written as `qtvit export` writes them, for the one image size."""
