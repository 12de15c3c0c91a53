"""Running a network in PyTorch, ONNX Runtime or OpenVINO behind one interface.

Shapes: B batch, H x W image.
"""

import zipfile
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtvit.device import kept_signal_stack, resolve_device

from .artifact import INPUT, METADATA_KEY, OUTPUT, Artifact, format_of
from .fuse import fuse

OPENVINO_CONFIG = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
"""ACCURACY keeps the precisions of the graph; by default, OpenVINO runs everything in bf16 on some CPUs."""


class Runtime(ABC):
    """Maps normalised pixels, (B, 3, H, W) in fp32, to logits in fp32: (B, num_classes), or (B, num_classes, H, W).

    Attributes:
        device: where pixels are expected and logits are returned.
    """

    device: torch.device

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """The logits of a batch of any size."""

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """The objects a detector finds in an image, (3, H, W) in 0..1; see `qtvit.tasks.detect.model.Detector`."""
        raise NotImplementedError(f"{type(self).__name__} runs no detectors")

    def close(self) -> None:  # noqa: B027
        """Release the runtime's memory; it cannot be called afterwards."""


class Network(Runtime):
    """A PyTorch network.

    Args:
        module: the network as it was trained; put into evaluation mode and onto the device.
        device: where it runs.
        threads: CPU threads, set for the whole process; None leaves PyTorch's number.
        fused: whether to run a fused copy (`qtvit.deploy.fuse`), which is faster. It is made at the first call.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, threads: int | None = None, fused: bool = False
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device
        self.module = module.eval().to(device)
        self.fused = fused

    @cached_property
    def running(self) -> nn.Module:
        """The module that runs: ``module`` or its fused copy."""
        return fuse(self.module, eager_cpu=self.device.type == "cpu") if self.fused else self.module

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.running(pixels).float()

    @torch.inference_mode()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        [found] = self.running([image.to(self.device)])
        return found


class Exported(Runtime):
    """An exported file; the base class of all formats.

    Args:
        path: the file.
        device: see `qtvit.device.resolve_device`; only .pt2 files run on other devices than the CPU.
        threads: CPU threads; None: as many as PyTorch uses.

    Attributes:
        artifact: the description in the file.
        runner: the runtime's own object that runs the graph.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the runtime is not installed.
        ValueError: the file cannot be read, was not written by `qtvit export`, or does not run on the device.
    """

    any_device: ClassVar[bool] = False
    """Whether the runtime runs on other devices than the CPU."""

    runner: Any

    def __init__(self, path: Path, device: str = "auto", threads: int | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        self.threads = torch.get_num_threads() if threads is None else threads
        self.device = resolve_device(device)
        if self.device.type != "cpu" and not self.any_device:
            if device != "auto":
                raise ValueError(f"{path}: runs on the CPU, not on {device}")
            self.device = torch.device("cpu")
        description = self._open()
        if description is None:
            raise ValueError(
                f"{path}: has no {METADATA_KEY!r} entry in its metadata (class names, preprocessing), so "
                "`qtvit export` did not write it"
            )
        self.artifact = Artifact.from_json(description, path)

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"{self.path}: expected pixels of shape (B, 3, H, W), got {(*pixels.shape,)}")
        size, expected = tuple(pixels.shape[-2:]), self.artifact.img_size
        if "hw" not in self.artifact.dynamic and size != expected:
            given, wanted = ("x".join(map(str, side)) for side in (size, expected))
            raise ValueError(f"{self.path}: is for images of {wanted}, got {given}; export it with --dynamic batch,hw")
        if "batch" in self.artifact.dynamic:
            return self._run(pixels)
        return torch.cat([self._run(image) for image in pixels.split(1)])

    def close(self) -> None:
        self.runner = None

    @abstractmethod
    def _open(self) -> str | None:
        """Load the file into ``runner``; return the description in it, or None if it has none."""

    @abstractmethod
    def _run(self, pixels: Tensor) -> Tensor:
        """The logits of a batch of a size that the graph takes."""


def onnx_options(threads: int) -> Any:
    """The ``onnxruntime.SessionOptions`` with which files are run.

    By default, ONNX Runtime's threads spin for a while after each call, which slows down the rest of the process, such
    as the threads that read the next images; here they stop.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: it warns about leftovers of its own optimiser
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxFile(Exported):
    """An .onnx file in ONNX Runtime."""

    def _open(self) -> str | None:
        import onnxruntime

        options = onnx_options(self.threads)
        try:
            self.runner = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base class
            raise _unreadable(self.path, "ONNX Runtime", error) from error
        return self.runner.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    def _run(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.runner.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        names = [output.name for output in self.runner.get_outputs()]
        try:
            found = self.runner.run(names, {INPUT: image.numpy()})
        except Exception as error:  # its exceptions have no common base class
            height, width = image.shape[-2:]
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path}: cannot be run on an image of {width} x {height} px ({reason})") from error
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}


class OpenVINOFile(Exported):
    """An .xml file, with its .bin beside it, in OpenVINO."""

    def _open(self) -> str | None:
        import openvino

        with self.path.open("rb") as file:
            if b"<net" not in file.read(1000):
                raise ValueError(f"{self.path}: is not a model of OpenVINO")
        if not self.path.with_suffix(".bin").is_file():
            raise FileNotFoundError(f"{self.path}: its weights, {self.path.stem}.bin, are not beside it")
        core = openvino.Core()
        config = {**OPENVINO_CONFIG, "INFERENCE_NUM_THREADS": self.threads}
        try:
            model = core.read_model(self.path)
            with kept_signal_stack():
                self.runner = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise _unreadable(self.path, "OpenVINO", error) from error
        keys = [METADATA_KEY, "description"]
        return model.get_rt_info(keys).astype(str) if model.has_rt_info(keys) else None

    def _run(self, pixels: Tensor) -> Tensor:
        logits = self.runner.infer({INPUT: pixels.numpy()}, share_inputs=True, share_outputs=True)[OUTPUT]
        return torch.from_numpy(logits.copy())  # a copy, as the next call writes to the same memory


class ExportedProgram(Exported):
    """A .pt2 file in PyTorch, on any device."""

    any_device = True

    def _open(self) -> str | None:
        from torch.export.passes import move_to_device_pass

        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_KEY}")]
                if not names:
                    return None
                description = archive.read(names[0]).decode()
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise _unreadable(self.path, "PyTorch", error) from error
        program = torch.export.load(self.path)
        if self.device.type != "cpu":
            program = move_to_device_pass(program, self.device)
        self.runner = program.module()
        return description

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> Tensor:
        try:
            return self.runner(pixels)
        except AssertionError as error:  # a guard of the graph, for example against the smallest sizes
            raise ValueError(f"{self.path}: does not take pixels of shape {(*pixels.shape,)}: {error}") from error


def open_exported(path: str | Path, device: str = "auto", threads: int | None = None) -> Exported:
    """Open an exported file in its runtime; arguments and errors as `Exported`."""
    path = Path(path)
    name = format_of(path)
    if name is None:
        raise ValueError(f"{path}: expected a file that ends in .onnx, .xml or .pt2")
    kinds: dict[str, type[Exported]] = {"onnx": OnnxFile, "openvino": OpenVINOFile, "torch": ExportedProgram}
    return kinds[name](path, device, threads)


def _unreadable(path: Path, runtime: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()
    return ValueError(f"{path}: {runtime} cannot read it ({reason[-1].strip()})")
