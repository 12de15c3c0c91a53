"""Exporting a trained model, checked before it is kept."""

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
"""The source of a model without trained weights."""
NUM_SYNTHETIC = 32
"""Images made for the check when there are no others."""
NUM_IMAGES = 300
"""Images that are chosen of the calibration folder, and of labelled data, if there are more."""
NUM_DENSE = 8
"""Images for a network whose outputs are dense, where each takes longer."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        files: the file to load, and for OpenVINO the .bin beside it.
        artifact: its description.
        report: what the check found: `Report`, or another with its ``lines()`` and ``problem()``.
        images: in words, what it was checked on.
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
    """Export a model, run the file in its own runtime next to the model, and keep it if they agree.

    Args:
        source: run folder, model file, … as for `qtvit.checkpoints.load_model`; or a model's name, which is then built
            with random weights.
        format: a name in `FORMATS`.
        precision: one in `PRECISIONS` of the format.
        img_size: (H, W) of the images; None: that of the model's preprocessing.
        dynamic: which of "batch" and "hw" are left open; otherwise batches are of 1 and images of ``img_size``. None:
            "batch", or "hw" for a detector, which always takes one image of any size.
        calibration: folder of images, packed or not, or "digits", to find the ranges of int8 on, and to check the file
            on.
        data: folder of labelled images, or "digits", as for ``qtvit eval``; checks the accuracy too.
        max_drop: points of accuracy that may be lost on ``data``.
        out: file to write; None: "model" beside the run, or in this folder for a model from elsewhere.
        force: replace ``out`` if it is there.

    Raises:
        FileNotFoundError, FileExistsError, OSError: the source, images, or a file in the way.
        ModuleNotFoundError: a package of the extra ``deploy`` is not installed.
        ValueError: settings that do not go together, a model that cannot be exported, or a file that failed the check;
            then there is no file.
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
    images = None if calibration is None else _calibration_images(calibration)
    request = Request(format, precision, img_size, axes, dynamic is not None, images, data, max_drop, out)
    exporter: Exporter = tasks.get(info.task).load("exporter")(network, info, request)
    return exporter.export()


@dataclass(frozen=True)
class Request:
    """What is to be exported how; the fields that are not described here are arguments of `export_model`.

    Attributes:
        axes: the dynamic ones, in order.
        axes_given: whether they were asked for, and are not the default.
        calibration: images of the folder.
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


class Exporter(ABC):
    """The export of a network from pixels (B, 3, H, W) to logits; a task says what to check the file on.

    Attributes:
        network: in evaluation mode.
        info: its description.
        request: what is asked for.
    """

    dense: ClassVar[bool] = False
    """Whether the network scores every pixel."""

    def __init__(self, network: nn.Module, info: ModelInfo, request: Request) -> None:
        self.network = network
        self.info = info
        self.request = request

    @abstractmethod
    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], list[int] | None, str]:
        """Images to check the file on, their labels if they have such, and in words what they are."""

    @property
    def preprocess(self) -> Preprocess:
        """How images are made to fit the graph: as in evaluation."""
        return Preprocess(**self.info.preprocess)

    def score(self, predictor: Predictor[Any], exported: Exported) -> tuple[str, tuple[float, float]] | None:
        """What is measured on ``request.data`` besides, if anything: its name, and the network's and the file's score,
        in points.
        """
        return None

    def export(self) -> Export:
        """Write the file, check it, and move it to where it is asked for; errors as `export_model`."""
        request, network = self.request, self.network
        size = request.img_size or tuple(self.info.preprocess["size"])
        check_img_size(network, size, "--img-size")
        self.info = info = dataclasses.replace(self.info, preprocess={**self.info.preprocess, "size": list(size)})
        predictor = tasks.get(info.task).load("predictor")(network, info, "cpu")
        artifact = Artifact(info, request.format, request.precision, request.axes)
        images, labels, which = self.check_images(artifact)

        fused = fuse(network, None if "hw" in request.axes else artifact.img_size)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=request.out.parent) as folder:
            file = Path(folder, "new", request.out.name)
            file.parent.mkdir()
            others: dict[str, Path] = {}
            if request.calibration is not None and request.precision == "int8":
                for other in ("fp32", "bf16") if "bf16" in PRECISIONS[request.format] else ("fp32",):
                    others[other] = Path(folder, other, request.out.name)
                    others[other].parent.mkdir()
                    write(fused, dataclasses.replace(artifact, precision=other), others[other])
                labelled = (images, labels) if labels else None
                write_int8(
                    others["fp32"],
                    file,
                    artifact,
                    network,
                    request.calibration,
                    self.preprocess,
                    labelled,
                    request.max_drop,
                )
            else:
                write(fused, artifact, file)
            exported = open_exported(file, "cpu")
            report = check(
                predictor.runtime, exported, artifact, images, labels, request.max_drop, self.preprocess, self.dense
            )
            if request.data is not None and (scored := self.score(predictor, exported)):
                report = dataclasses.replace(report, score=scored[0], accuracy=scored[1])
            if others:
                report = dataclasses.replace(report, gain=_gain({request.precision: file, **others}))
            exported.close()
            if problem := report.problem():
                remedy = ""
                if (request.format, request.precision) == ("onnx", "int8") and labels:
                    remedy = "; --format openvino keeps layers in fp32 until it loses no more than --max-drop"
                raise ValueError(
                    f"not exported: the {request.precision} file for {_runtime_name(request.format)} failed its check: "
                    f"{problem}{remedy}"
                )
            written = sorted(file.parent.iterdir(), key=lambda path: path.suffix == file.suffix)  # the one to load last
            for path in written:
                os.replace(path, request.out.with_name(path.name))
        return Export([request.out.with_name(path.name) for path in reversed(written)], artifact, report, which)


def _gain(files: dict[str, Path]) -> Gain:
    """The sizes and speeds of a network's files, each alone in its folder, by precision."""
    runtimes = [open_exported(file, "cpu") for file in files.values()]
    seconds = time_in_turns(runtimes, torch.zeros(1, 3, *runtimes[0].artifact.img_size))
    for runtime in runtimes:
        runtime.close()
    num_bytes = [sum(part.stat().st_size for part in file.parent.iterdir()) for file in files.values()]
    return Gain(dict(zip(files, num_bytes, strict=True)), dict(zip(files, seconds, strict=True)))


def default_path(source: str | Path, format: str, precision: str) -> Path:
    """Where `export_model` writes to: RUN/model.onnx, model-int8.onnx beside model.safetensors, ./NAME.onnx."""
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
    """The dynamic axes in order; ValueError if the settings do not go together."""
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    known = ("fp32", "bf16", "fp16", "int8")
    if precision not in known:
        raise unknown_name("precision", precision, known)
    if precision not in PRECISIONS[format]:
        others = " or ".join(name for name, precisions in PRECISIONS.items() if precision in precisions)
        why = {
            ("onnx", "bf16"): "ONNX Runtime has no bf16 convolutions for the CPU",
            ("torch", "int8"): "PyTorch's own int8 is not written here",
        }[format, precision]
        raise ValueError(f"--format {format} has no --precision {precision}: {why}; --format {others} has it")
    for name in dynamic:
        if name not in ("batch", "hw"):
            raise unknown_name("dynamic axis", name, ("batch", "hw"))
    if precision == "int8" and "hw" in dynamic:
        raise ValueError(
            "--precision int8 with --dynamic hw: the ranges of int8 are measured at one image size and do not hold at "
            "others; export one file for each --img-size, or --precision fp16"
        )
    if precision == "int8" and calibration is None:
        raise ValueError("--precision int8 needs --calibration, a folder of typical images to measure ranges on")
    return tuple(name for name in ("batch", "hw") if name in dynamic)


def _check_out(out: Path, format: str, force: bool) -> Path:
    """``out``, if a file of this format can be written there."""
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
    """Whether ``source`` is no more than a model's name; the errors of `find_model_file` if it is nothing at all."""
    try:
        find_model_file(source)
        return False
    except FileNotFoundError:
        if Path(source).exists() or not timm.is_model(str(source)):
            raise
        return True


@torch.no_grad()
def _random_model(name: str) -> tuple[nn.Module, ModelInfo]:
    """A model that was never trained, whose activations have the size of a trained one's.

    As it is built, the residual branches are silent and signals fade to numbers so small that they slow CPUs down; so
    its BatchNorms get weights of 1 and the statistics of a few images.
    """
    say(f"{name}: {RANDOM}; its predictions mean nothing")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = build_model(name)
    info = dataclasses.replace(ModelInfo.of_weights(name, {"num_classes": model.num_classes}), source=RANDOM)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # an average of all batches
            if module.affine:
                nn.init.ones_(module.weight)
    transform = Preprocess(**info.preprocess).transform()
    pixels = [transform(open_image(image)) for image in synthetic_images(8, info.preprocess["size"], seed=1)]
    model.train()(torch.stack(pixels))
    return model.eval(), info


def _calibration_images(folder: str | Path) -> list[ImageSource]:
    """`NUM_IMAGES` of the images of ``folder``, always the same."""
    found = all_images(str(folder))
    return [found[i] for i in chosen(len(found))]


def chosen(num_images: int, most: int = NUM_IMAGES) -> list[int]:
    """Positions of ``most`` of so many images, in order."""
    return sorted(random.Random(0).sample(range(num_images), min(most, num_images)))


def _runtime_name(format: str) -> str:
    return {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}[format]
