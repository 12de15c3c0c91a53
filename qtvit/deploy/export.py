"""Exporting a trained model, checked before it is kept."""

import dataclasses
import importlib.util
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from qtvit.checkpoints import BEST, ModelInfo, find_model_file, load_model
from qtvit.console import say
from qtvit.data import ImageSource, Preprocess, load_held_out, load_segmentation_data, open_image
from qtvit.errors import unknown_name
from qtvit.files import open_folder
from qtvit.models import build_model
from qtvit.models.build import check_img_size

from .artifact import FORMATS, PRECISIONS, Artifact
from .check import MAX_DROP, Gain, Report, check, synthetic_images, time_in_turns
from .detections import DetectPredictor
from .detector import DetectorReport, check_detector, write_detector
from .formats import REQUIRED, write
from .fuse import fuse
from .held_out import all_images, held_out_samples
from .predictor import ClassPredictor
from .quantize import write_int8
from .runtimes import open_exported
from .segment import SegmentPredictor, Views, mask_classes
from .segment_evaluate import evaluate

RANDOM = "random weights, for timing"
"""The source of a model without trained weights."""
NUM_SYNTHETIC = 32
"""Images made for the check when there are no others."""
NUM_IMAGES = 300
"""Images that are chosen of the calibration folder, and of labelled data, if there are more."""
NUM_DENSE, NUM_MASKS = 8, 100
"""For a segmenter, images whose pixels are compared, and images with masks for its mIoU."""

_PREDICTORS: dict[str, type[ClassPredictor | SegmentPredictor]] = {
    "classify": ClassPredictor,
    "segment": SegmentPredictor,
}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        files: the file to load, and for OpenVINO the .bin beside it.
        artifact: its description.
        report: what the check found.
        images: in words, what it was checked on.
    """

    files: list[Path]
    artifact: Artifact
    report: Report | DetectorReport
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
    network, info = _random_model(str(source)) if is_random else _trained_model(source)
    calibration_images = None if calibration is None else _calibration_images(calibration)
    if info.task == "detect":
        _check_for_detector(format, precision, img_size, dynamic)
        return _export_detector(network, info, out, _detector_images(info, data, calibration_images))
    size = img_size or tuple(info.preprocess["size"])
    check_img_size(network, size, "--img-size")
    info = dataclasses.replace(info, preprocess={**info.preprocess, "size": list(size)})
    predictor = _PREDICTORS[info.task](network, info, "cpu")
    artifact = Artifact(info, format, precision, axes)
    images, labels, which = _check_images(artifact, data, calibration_images)

    fused = fuse(network, None if "hw" in axes else artifact.img_size)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        file = Path(folder, "new", out.name)
        file.parent.mkdir()
        others: dict[str, Path] = {}
        if calibration_images is not None and precision == "int8":
            for other in ("fp32", "bf16") if "bf16" in PRECISIONS[format] else ("fp32",):
                others[other] = Path(folder, other, out.name)
                others[other].parent.mkdir()
                write(fused, dataclasses.replace(artifact, precision=other), others[other])
            labelled = (images, labels) if labels else None
            write_int8(others["fp32"], file, artifact, network, calibration_images, labelled, max_drop)
        else:
            write(fused, artifact, file)
        exported = open_exported(file, "cpu")
        report = check(predictor.runtime, exported, artifact, images, labels, max_drop)
        if data is not None and isinstance(predictor, SegmentPredictor):
            scores = _mean_ious([predictor, SegmentPredictor(exported, info)], data, "hw" not in axes)
            report = dataclasses.replace(report, accuracy=scores, score="mIoU")
        if others:
            report = dataclasses.replace(report, gain=_gain({precision: file, **others}))
        exported.close()
        if problem := report.problem():
            remedy = ""
            if (format, precision) == ("onnx", "int8") and labels:
                remedy = "; --format openvino keeps layers in fp32 until it loses no more than --max-drop"
            raise ValueError(
                f"not exported: the {precision} file for {_runtime_name(format)} failed its check: {problem}{remedy}"
            )
        written = sorted(file.parent.iterdir(), key=lambda path: path.suffix == out.suffix)  # the one to load last
        for path in written:
            os.replace(path, out.with_name(path.name))
    return Export([out.with_name(path.name) for path in reversed(written)], artifact, report, which)


def _export_detector(detector: Any, info: ModelInfo, out: Path, images: tuple[list[ImageSource], str]) -> Export:
    """`export_model` for a detector."""
    artifact = Artifact(info, "onnx", "fp32", ("hw",))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        file = Path(folder, out.name)
        write_detector(detector, artifact, file)
        exported = open_exported(file, "cpu")
        report = check_detector(DetectPredictor(detector, info, "cpu").runtime, exported, images[0])
        exported.close()
        if problem := report.problem():
            raise ValueError(f"not exported: the file for ONNX Runtime failed its check: {problem}")
        os.replace(file, out)
    return Export([out], artifact, report, images[1])


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


def _check_for_detector(
    format: str, precision: str, img_size: tuple[int, int] | None, dynamic: Sequence[str] | None
) -> None:
    """ValueError for settings that a detector's file does not have."""
    if (format, precision) != ("onnx", "fp32"):
        raise ValueError(f"a detector is exported with --format onnx --precision fp32, not {format} and {precision}")
    if img_size is not None:
        raise ValueError(
            "--img-size: the file of a detector takes images of any size and resizes them itself, as in training"
        )
    if dynamic is not None and list(dynamic) != ["hw"]:
        raise ValueError(
            f"--dynamic {','.join(dynamic) or 'none'}: the file of a detector takes one image of any size, which is hw"
        )


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


def _trained_model(source: str | Path) -> tuple[nn.Module, ModelInfo]:
    """The network of a run, ready to be exported."""
    network: Any
    network, info = load_model(source)
    if info.task == "segment":
        network.aux = None  # for training alone
        info = dataclasses.replace(info, task_args={**info.task_args, "aux": False})
    return network, info


def _mean_ious(predictors: Sequence[SegmentPredictor], data: str, window: bool) -> tuple[float, float]:
    """mIoU in percent of the network and of the file, both in windows if the file has to."""
    loaded = load_segmentation_data(data, ignore_index=predictors[0].mask_classes.ignore_index)
    samples = [loaded.val[i] for i in _chosen(len(loaded.val), NUM_MASKS)]
    views = Views(window=True if window else None)
    network, file = (
        evaluate(predictor, samples, loaded.mask_classes, views).scores.mean_iou() for predictor in predictors
    )
    return network, file


def _calibration_images(folder: str | Path) -> list[ImageSource]:
    """`NUM_IMAGES` of the images of ``folder``, always the same."""
    found = all_images(str(folder))
    return [found[i] for i in _chosen(len(found))]


def _check_images(
    artifact: Artifact, data: str | None, calibration: list[ImageSource] | None
) -> tuple[list[ImageSource], list[int] | None, str]:
    """Images to check the file on, their labels if they have such, and in words what they are."""
    if artifact.info.task == "segment" and data is not None:
        val = load_segmentation_data(data, ignore_index=mask_classes(artifact.info).ignore_index).val
        dense: list[ImageSource] = [val[i].image for i in _chosen(len(val), NUM_DENSE)]
        return dense, None, f"{len(dense)} images of val in {data}"
    if artifact.info.task == "segment":
        some_images = calibration or synthetic_images(NUM_DENSE, artifact.img_size)
        kind = "calibration" if calibration else "synthetic"
        return some_images[:NUM_DENSE], None, f"{len(some_images[:NUM_DENSE])} {kind} images"
    if data is not None:
        samples, which = held_out_samples(data, artifact.info)
        chosen = [samples[i] for i in _chosen(len(samples))]
        part = f"{len(chosen)} images drawn from " if len(chosen) < len(samples) else ""
        return [image for image, _ in chosen], [label for _, label in chosen], f"{part}{which}"
    if calibration is not None:
        return calibration, None, f"{len(calibration)} calibration images"
    images = synthetic_images(NUM_SYNTHETIC, artifact.img_size)
    return images, None, f"{len(images)} synthetic images (--data or --calibration gives real ones)"


def _detector_images(
    info: ModelInfo, data: str | None, calibration: list[ImageSource] | None
) -> tuple[list[ImageSource], str]:
    """Images to check a detector's file on, and in words what they are."""
    if data is not None:
        names = dict(zip(info.task_args["category_ids"], info.classes, strict=True))
        val = load_held_out(data, names, use_masks=False)
        images: list[ImageSource] = [val[i].image for i in _chosen(len(val), NUM_DENSE)]
        which = f"images of val in {data}"
    elif calibration is not None:
        images, which = calibration[:NUM_DENSE], "calibration images"
    else:
        side = max(info.task_args["min_size"])
        images, which = synthetic_images(NUM_DENSE, (side, side * 4 // 3)), "synthetic images"
    return images, f"{len(images)} {which}, upright and on their side"


def _chosen(num_images: int, most: int = NUM_IMAGES) -> list[int]:
    """Positions of ``most`` of so many images, in order."""
    return sorted(random.Random(0).sample(range(num_images), min(most, num_images)))


def _runtime_name(format: str) -> str:
    return {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}[format]
