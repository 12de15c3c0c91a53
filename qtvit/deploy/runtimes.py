"""What runs a network: PyTorch, ONNX Runtime or OpenVINO, all called alike.

Shapes: B batch, H x W image.
"""

import zipfile
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtvit.device import kept_signal_stack, resolve_device

from .artifact import INPUT, METADATA_KEY, OUTPUT, Artifact, format_of, no_description
from .fuse import fuse

OPENVINO_CONFIG = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
"""ACCURACY: in the precisions that the graph says, where OpenVINO by default makes bf16 of all on some CPUs."""


class Runtime(ABC):
    """A network that maps normalised pixels, (B, 3, H, W) in fp32, to logits, (B, num_classes) or for each pixel
    (B, num_classes, H, W), in fp32.

    Attributes:
        device: where pixels are expected, and logits come from.
    """

    device: torch.device

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """The logits of a batch of any size."""

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """What a detector finds in an image, (3, H, W) in 0..1 (see `qtvit.tasks.detect.model.Detector`)."""
        raise NotImplementedError(f"{type(self).__name__} runs no detectors")

    def close(self) -> None:  # noqa: B027
        """Free what it holds; it cannot be called any more."""


class Network(Runtime):
    """A PyTorch network as it was trained.

    Args:
        module: the network; it is put into evaluation mode and onto the device.
        device: where it runs.
        threads: of the CPU; None leaves PyTorch's number. It holds for the whole process.
    """

    def __init__(self, module: nn.Module, device: torch.device, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device
        self.module = module.eval().to(device)

    @cached_property
    def running(self) -> nn.Module:
        """What runs: the network itself."""
        return self.module

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.running(pixels).float()

    @torch.inference_mode()
    def detect(self, image: Tensor) -> dict[str, Tensor]:
        [found] = self.running([image.to(self.device)])
        return found


class FusedNetwork(Network):
    """A PyTorch network that runs fused, which is faster; ``module`` stays as it was trained."""

    @cached_property
    def running(self) -> nn.Module:
        """The network fused (`qtvit.deploy.fuse`), as it is when this is first asked for."""
        return fuse(self.module, eager_cpu=self.device.type == "cpu")


class Exported(Runtime):
    """An exported file: what all formats share.

    Args:
        path: the file.
        device: see `qtvit.device.resolve_device`; all but .pt2 files run on the CPU alone.
        threads: of the CPU; None: as many as PyTorch has.

    Attributes:
        artifact: the description in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the runtime is not installed.
        ValueError: the file cannot be read or was not written by `qtvit export`, or does not run on the device.
    """

    artifact: Artifact

    def __init__(self, path: Path, device: str = "auto", threads: int | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        self.threads = torch.get_num_threads() if threads is None else threads
        self.device = self._resolve(device)
        description = self._open()
        if description is None:
            raise no_description(path)
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

    def _resolve(self, device: str) -> torch.device:
        if resolve_device(device).type != "cpu" and device != "auto":
            raise ValueError(f"{self.path}: runs on the CPU, not on {device}")
        return torch.device("cpu")

    @abstractmethod
    def _open(self) -> str | None:
        """Load the file; returns the description in it, if there is one."""

    @abstractmethod
    def _run(self, pixels: Tensor) -> Tensor:
        """The logits of a batch that fits the graph."""


def onnx_options(threads: int) -> Any:
    """How ONNX Runtime is to run a file.

    Its threads would go on turning for a while when their work is done, and slow down what else the process does, such
    as reading the next images.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; it warns of what its own optimiser leaves behind
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxFile(Exported):
    """An .onnx file in ONNX Runtime."""

    def _open(self) -> str | None:
        import onnxruntime

        options = onnx_options(self.threads)
        try:
            self.session: Any = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base class of their own
            raise _unreadable(self.path, "ONNX Runtime", error) from error
        return self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    def _run(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: pixels.numpy()})[0])

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = self.session.run(names, {INPUT: image.numpy()})
        except Exception as error:  # its errors have no base class of their own
            height, width = image.shape[-2:]
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path}: cannot be run on an image of {width} x {height} px ({reason})") from error
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}

    def close(self) -> None:
        self.session = None


class OpenVINOFile(Exported):
    """An .xml file, with its .bin beside it, in OpenVINO."""

    def _open(self) -> str | None:
        import openvino

        keys = [METADATA_KEY, "description"]
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
                self.request: Any = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise _unreadable(self.path, "OpenVINO", error) from error
        return model.get_rt_info(keys).astype(str) if model.has_rt_info(keys) else None

    def _run(self, pixels: Tensor) -> Tensor:
        logits = self.request.infer({INPUT: pixels.numpy()}, share_inputs=True, share_outputs=True)[OUTPUT]
        return torch.from_numpy(logits.copy())  # the next call writes to the same memory

    def close(self) -> None:
        self.request = None


class ExportedProgram(Exported):
    """A .pt2 file in PyTorch, on any device."""

    def _resolve(self, device: str) -> torch.device:
        return resolve_device(device)

    def _open(self) -> str | None:
        from torch.export.passes import move_to_device_pass

        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        description = _pt2_description(self.path)
        if description is not None:
            program = torch.export.load(self.path)
            if self.device.type != "cpu":
                program = move_to_device_pass(program, self.device)
            self.module: Any = program.module()
        return description

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> Tensor:
        try:
            return self.module(pixels)
        except AssertionError as error:  # a guard of the graph, as on the smallest sizes
            raise ValueError(f"{self.path}: does not take pixels of shape {(*pixels.shape,)}: {error}") from error

    def close(self) -> None:
        self.module = None


_OPENERS: dict[str, type[Exported]] = {"onnx": OnnxFile, "openvino": OpenVINOFile, "torch": ExportedProgram}


def open_exported(path: str | Path, device: str = "auto", threads: int | None = None) -> Exported:
    """The exported file ``path``, ready to be called; arguments and errors as `Exported`."""
    path = Path(path)
    name = format_of(path)
    if name is None:
        raise ValueError(f"{path}: expected a file that ends in .onnx, .xml or .pt2")
    return _OPENERS[name](path, device, threads)


def _pt2_description(path: Path) -> str | None:
    """The description in a .pt2 file, which is a zip archive; ValueError if it is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_KEY}")]
            return archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise _unreadable(path, "PyTorch", error) from error


def _unreadable(path: Path, runtime: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()
    return ValueError(f"{path}: {runtime} cannot read it ({reason[-1].strip()})")
