"""Exporting a model to another runtime; the file is checked against the model and kept only if both agree."""

import dataclasses
import importlib.util
import os
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import nn

from qtvit import tasks
from qtvit.checkpoints import BEST, ModelInfo, find_model_file, load_model
from qtvit.console import say
from qtvit.data import ImageSource, Preprocess, open_image
from qtvit.data.folders import all_images
from qtvit.errors import unknown_name
from qtvit.files import open_folder
from qtvit.models import build_model
from qtvit.models.build import check_img_size

from .artifact import FORMATS, PRECISIONS, Artifact
from .formats import REQUIRED, write
from .fuse import fuse
from .parity import MAX_DROP, Gain, check, synthetic_images, time_in_turns
from .predictor import Predictor
from .quantize import write_int8
from .runtimes import Exported, open_exported

RANDOM = "random weights, for timing"
"""``ModelInfo.source`` of a model that was exported untrained."""
NUM_IMAGES = 300
"""Largest number of images drawn from the calibration folder or the labelled data."""
NUM_DENSE = 8
"""The same for detectors and segmenters, which take longer for each image."""


@dataclass(frozen=True)
class Export:
    """The result of `export_model`.

    Attributes:
        files: the file to load, then, for OpenVINO, the .bin with its weights.
        artifact: the description in the file.
        report: result of the check: a `Report`, or another object with its ``lines()`` and ``problem()``.
        images: the images of the check, in words.
    """

    files: list[Path]
    artifact: Artifact
    report: Any
    images: str


def export_model(
    source: str | Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    img_size: tuple[int, int] | None = None,
    dynamic: Sequence[str] | None = None,
    calibration: str | Path | None = None,
    data: str | None = None,
    max_drop: float = MAX_DROP,
    out: str | Path | None = None,
    force: bool = False,
) -> Export:
    """Export a model, run the file in its own runtime next to the model, and keep it if both agree.

    Args:
        source: what `qtvit.checkpoints.load_model` takes, or a model's name, which is built with random weights.
        format: a name in `FORMATS`.
        precision: one of the format's `PRECISIONS`.
        img_size: (H, W) of the images; None: the size in the model's preprocessing.
        dynamic: which of "batch" and "hw" (height and width) may vary; the others are fixed to 1 and ``img_size``.
            None: "batch"; for a detector "hw", as its file always takes one image of any size.
        calibration: folder of images, packed or not, or "digits". The file is checked on them, and int8 measures the
            ranges of activations on them.
        data: labelled images as for ``qtvit eval``; the file's accuracy is then checked too.
        max_drop: largest loss of accuracy on ``data``, in percentage points.
        out: file to write; None: see `default_path`.
        force: replace ``out`` if it exists.

    Raises:
        OSError: the source or images do not exist, or ``out`` exists or cannot be written.
        ModuleNotFoundError: a package of the extra ``deploy`` is not installed.
        ValueError: the settings contradict each other, the model cannot be exported, or the file failed its check and
            was removed.
    """
    axes = _check_settings(format, precision, ("batch",) if dynamic is None else dynamic, calibration)
    if not max_drop >= 0:
        raise ValueError(f"--max-drop must be 0 or more points, got {max_drop:g}")
    is_random = _is_random(source)
    out = _check_out(Path(out) if out else default_path(source, format, precision), format, force)
    for package in REQUIRED[format] + (("nncf",) if (format, precision) == ("openvino", "int8") else ()):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed; pip install 'qtvit[deploy]'", name=package)
    network, info = _random_model(str(source)) if is_random else load_model(source)
    images = None
    if calibration is not None:
        found = all_images(str(calibration))
        images = [found[i] for i in chosen(len(found))]
    request = Request(format, precision, img_size, axes, dynamic is not None, images, data, max_drop, out)
    exporter: Exporter = tasks.get(info.task).load("exporter")(network, info, request)
    return exporter.export()


@dataclass(frozen=True)
class Request:
    """The checked settings of `export_model`; fields not described here are its arguments.

    Attributes:
        axes: the dynamic axes: "batch" before "hw".
        axes_given: whether the user named them.
        calibration: the images drawn from the folder.
    """

    format: str
    precision: str
    img_size: tuple[int, int] | None
    axes: tuple[str, ...]
    axes_given: bool
    calibration: list[ImageSource] | None
    data: str | None
    max_drop: float
    out: Path


@dataclass
class Exporter(ABC):
    """Exports a network that maps pixels (B, 3, H, W) to logits. Each task has a subclass, with its check images.

    Attributes:
        network: in evaluation mode.
        info: description of the model.
        request: the settings.
    """

    dense: ClassVar[bool] = False
    """Whether the logits are per pixel."""

    network: nn.Module
    info: ModelInfo
    request: Request

    @abstractmethod
    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], list[int] | None, str]:
        """Images to check the file on, their labels if they have any, and a description of the images."""

    @property
    def preprocess(self) -> Preprocess:
        """How images become the graph's input; by default as in evaluation."""
        return Preprocess(**self.info.preprocess)

    def score(self, predictor: Predictor[Any], exported: Exported) -> tuple[str, tuple[float, float]] | None:
        """A further score on ``request.data``: its name, and the network's and the file's values in percent."""
        return None

    def export(self) -> Export:
        """Write a temporary file, check it, and move it to ``request.out``; errors as `export_model`."""
        request, network = self.request, self.network
        size = request.img_size or tuple(self.info.preprocess["size"])
        check_img_size(network, size, "--img-size")
        self.info = info = dataclasses.replace(self.info, preprocess={**self.info.preprocess, "size": list(size)})
        predictor = tasks.get(info.task).load("predictor")(network, info, "cpu")
        artifact = Artifact(info, request.format, request.precision, request.axes)
        images, labels, which = self.check_images(artifact)

        precisions = [request.precision]
        if request.precision == "int8":  # which is made from the fp32 file and compared with these in size and speed
            precisions += [name for name in ("fp32", "bf16") if name in PRECISIONS[request.format]]
        fused = fuse(network, None if "hw" in request.axes else artifact.img_size)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=request.out.parent) as folder:
            files = {name: Path(folder, name, request.out.name) for name in precisions}
            for name, path in files.items():
                path.parent.mkdir()
                if name != "int8":
                    write(fused, dataclasses.replace(artifact, precision=name), path)
            file = files[request.precision]
            if request.precision == "int8":
                assert request.calibration is not None
                labelled = (images, labels) if labels else None
                transform = self.preprocess.transform()
                write_int8(
                    files["fp32"], file, artifact, network, request.calibration, transform, labelled, request.max_drop
                )
            exported = open_exported(file, "cpu")
            report = check(
                predictor.runtime, exported, artifact, images, labels, request.max_drop, self.preprocess, self.dense
            )
            if request.data is not None and (scored := self.score(predictor, exported)):
                report = dataclasses.replace(report, score=scored[0], accuracy=scored[1])
            if request.precision == "int8":
                report = dataclasses.replace(report, gain=_gain(files))
            exported.close()
            if problem := report.problem():
                runtime = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}[request.format]
                remedy = ""
                if (request.format, request.precision) == ("onnx", "int8") and labels:
                    remedy = "; --format openvino keeps layers in fp32 until it loses no more than --max-drop"
                raise ValueError(
                    f"not exported: the {request.precision} file for {runtime} failed its check: {problem}{remedy}"
                )
            # The file to load is moved last, when the .bin that it refers to is in place.
            written = sorted(file.parent.iterdir(), key=lambda path: path.suffix == file.suffix)
            for path in written:
                os.replace(path, request.out.with_name(path.name))
        return Export([request.out.with_name(path.name) for path in reversed(written)], artifact, report, which)


def _gain(files: dict[str, Path]) -> Gain:
    """Sizes and speeds of a network's files, by precision; each file lies alone in its folder."""
    runtimes = [open_exported(file, "cpu") for file in files.values()]
    seconds = time_in_turns(runtimes, torch.zeros(1, 3, *runtimes[0].artifact.img_size))
    for runtime in runtimes:
        runtime.close()
    num_bytes = [sum(part.stat().st_size for part in file.parent.iterdir()) for file in files.values()]
    return Gain(dict(zip(files, num_bytes, strict=True)), dict(zip(files, seconds, strict=True)))


def default_path(source: str | Path, format: str, precision: str) -> Path:
    """Where `export_model` writes by default: into the run folder, beside the model file, or else here.

    RUN/model.onnx, RUN/model-int8.onnx, FOLDER/NAME.onnx for FOLDER/NAME.safetensors, ./NAME.onnx.
    """
    suffix = ("" if precision == "fp32" else f"-{precision}") + FORMATS[format]
    path = Path(source)
    if path.is_dir():
        return path / f"model{suffix}"
    if path.is_file():
        return path.with_name(f"{'model' if path.name == BEST else path.stem}{suffix}")
    return Path(f"{str(source).rpartition('/')[-1]}{suffix}")


def _check_settings(
    format: str, precision: str, dynamic: Sequence[str], calibration: str | Path | None
) -> tuple[str, ...]:
    """The dynamic axes in order; ValueError if the settings contradict each other."""
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    known = PRECISIONS["openvino"]  # which has them all
    if precision not in known:
        raise unknown_name("precision", precision, known)
    if precision not in PRECISIONS[format]:
        others = " or ".join(name for name, precisions in PRECISIONS.items() if precision in precisions)
        why = {
            ("onnx", "bf16"): "ONNX Runtime has no bf16 convolutions for the CPU",
            ("torch", "int8"): "PyTorch's own int8 is not written here",
        }[format, precision]
        raise ValueError(f"--format {format} has no --precision {precision}: {why}; --format {others} has it")
    axes = ("batch", "hw")
    for name in dynamic:
        if name not in axes:
            raise unknown_name("dynamic axis", name, axes)
    if precision == "int8" and "hw" in dynamic:
        raise ValueError(
            "--precision int8 with --dynamic hw: the ranges of int8 are measured at one image size and do not hold at "
            "others; export one file for each --img-size, or --precision fp16"
        )
    if precision == "int8" and calibration is None:
        raise ValueError("--precision int8 needs --calibration, a folder of typical images to measure ranges on")
    return tuple(name for name in axes if name in dynamic)


def _check_out(out: Path, format: str, force: bool) -> Path:
    """Return ``out`` if a file of this format can be written there; make its folder."""
    if out.suffix != FORMATS[format]:
        raise ValueError(f"{out}: a file of --format {format} has to end in {FORMATS[format]}")
    for path in (out, *([out.with_suffix(".bin")] if format == "openvino" else [])):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists already; name another --out, or replace it with --force")
    open_folder(out.parent)
    return out


def _is_random(source: str | Path) -> bool:
    """Whether ``source`` is only the name of an architecture; the errors of `find_model_file` if it is nothing."""
    try:
        find_model_file(source)
        return False
    except FileNotFoundError:
        if Path(source).exists() or not timm.is_model(str(source)):
            raise
        return True


@torch.no_grad()
def _random_model(name: str) -> tuple[nn.Module, ModelInfo]:
    """An untrained model whose activations are about as large as a trained model's, so that it takes as long to run.

    As initialised, residual branches output zeros and signals fade to denormal numbers, which slow CPUs down. So its
    BatchNorms get weights of 1 and the statistics of a few synthetic images.
    """
    say(f"{name}: {RANDOM}; its predictions mean nothing")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = build_model(name)
    info = dataclasses.replace(ModelInfo.of_weights(name, {"num_classes": model.num_classes}), source=RANDOM)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # running statistics become the mean over all batches
            if module.affine:
                nn.init.ones_(module.weight)
    transform = Preprocess(**info.preprocess).transform()
    pixels = [transform(open_image(image)) for image in synthetic_images(8, info.preprocess["size"], seed=1)]
    model.train()(torch.stack(pixels))
    return model.eval(), info


def chosen(num_images: int, most: int = NUM_IMAGES) -> list[int]:
    """Sorted positions of at most ``most`` of ``num_images`` images; the same ones every time."""
    return sorted(random.Random(0).sample(range(num_images), min(most, num_images)))
