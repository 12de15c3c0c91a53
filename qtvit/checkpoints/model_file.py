"""The model file: weights as safetensors, with all that is needed to use them in its metadata."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import Tensor, nn

from qtvit import tasks
from qtvit.files import replacing
from qtvit.models import ARCHITECTURES, SHIPPED_WEIGHTS, QTViT, build_model
from qtvit.models.foreign import kernel_mismatch, rename_keys, take_over
from qtvit.version import __version__

from .hub import HUB_FILE, locate
from .weights import DEFAULT_KERNEL, Weights, identify_model, possible_kernels, read_weights

METADATA_KEY = "qtvit"
WEIGHT_SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of ``timm.create_model`` that say where weights come from."""
ATTENTION_ARGS = ("kernel", "ape", "shortcut", "attn_eps")
"""Arguments of a model that say which weights its attention has, and what they mean."""
BEST = "best.safetensors"
"""Name of the model file in a run folder."""


@dataclass(frozen=True)
class ModelInfo:
    """The description in a model file.

    Attributes:
        model: name for ``timm.create_model``.
        model_args: arguments the model was built with.
        classes: names in the order of the outputs.
        preprocess: fields of ``qtvit.data.Preprocess``.
        metrics: scores on the held-out images.
        split: how images were held out from training, see `LabelledImages` of the task "classify"; empty if the data
            came with a separate held-out part.
        task: name in the registry of tasks, such as "classify".
        task_args: further arguments of the task's network, such as its heads and the ids of its categories.
        source: file and origin of converted weights; empty for weights trained by qtvit.
        version: version of qtvit that wrote the file.
    """

    model: str
    model_args: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    task: str = "classify"
    task_args: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    version: str = ""

    @classmethod
    def of_weights(cls, model: str, model_args: dict[str, Any]) -> "ModelInfo":
        """A description of weights that have none: the model's preprocessing, and ImageNet's classes if 1000."""
        num_classes = model_args["num_classes"]
        imagenet = ImageNetInfo().label_names()
        classes = list(imagenet) if num_classes == len(imagenet) else [f"class {i}" for i in range(num_classes)]
        with torch.device("meta"):
            cfg = resolve_model_data_config(build_model(model, **model_args))
        preprocess = {name: cfg[name] for name in ("crop_pct", "interpolation", "mean", "std")}
        preprocess["size"] = list(model_args.get("img_size", cfg["input_size"][1:]))
        return cls(model, model_args, classes, preprocess)


def own_args(model_args: dict[str, Any]) -> dict[str, Any]:
    """``model_args`` without `WEIGHT_SOURCES`, for a model file, which has weights of its own."""
    return {name: value for name, value in model_args.items() if name not in WEIGHT_SOURCES}


def save_model(path: Path, state_dict: dict[str, Tensor], info: ModelInfo) -> None:
    """Write the model file in one step, so that a crash leaves either the old file or the new one.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    info = dataclasses.replace(info, model_args=own_args(info.model_args), version=__version__)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(dataclasses.asdict(info))})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def load_model(
    path: str | Path, *, task: str | None = None, swap_kernel: bool = False, **model_args: Any
) -> tuple[nn.Module, ModelInfo]:
    """Load a model, in evaluation mode and on the CPU, and its description.

    Args:
        path: run folder, model file, weights without a description (of a model of ours, the authors' release or
            EfficientViT), name of a model that comes with the package (nano-cifar10), or "hf-hub:USER/MODEL".
        task: the task that the model must be for; None for any.
        swap_kernel: build a model with the default attention, or the one in ``model_args``, whatever attention the
            weights were trained with, and load what both have in common (`qtvit.models.foreign.take_over`).
        model_args: added to the arguments that the model was built with, or replacing them. ``kernel`` cannot be
            replaced, as weights are trained with one; it is needed for weights that several kernels may have.

    Raises:
        FileNotFoundError: there is no such file, or no model file in the run folder.
        ValueError: it holds no model, one for another task or kernel, or weights or classes that do not fit it.
    """
    path = find_model_file(path)
    kernel = model_args.get("kernel")
    state_dict, info = read_model_file(path, kernel, swap_kernel)
    if task is not None:
        check_task(path, info, task)
    known_args, is_ours = info.model_args, info.model.split(".")[0] in ARCHITECTURES
    trained = known_args.get("kernel", DEFAULT_KERNEL)
    if swap_kernel:
        if not is_ours:
            raise ValueError(f"{path}: its {info.model} has no attention kernel that could be swapped")
        known_args = {name: value for name, value in known_args.items() if name not in ATTENTION_ARGS}
    elif is_ours and kernel not in (None, trained):
        raise ValueError(f"{path}: its {info.model} was trained with kernel {trained}, not {kernel}")
    info = dataclasses.replace(info, model_args={**known_args, **model_args})
    model: Any = tasks.get(info.task).load("build")(info.model, info.model_args, info.task_args)
    if swap_kernel:
        state_dict = take_over(state_dict, model.state_dict(), model.kernel)
    elif isinstance(model, QTViT) and (mismatch := kernel_mismatch(state_dict, model.kernel)):
        raise ValueError(f"{path}: {mismatch}")
    try:
        load_strictly(model, state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: its weights do not fit {info.model}: {error}") from error
    if len(info.classes) != model.num_classes:
        raise ValueError(f"{path}: names {len(info.classes)} classes, but its {info.model} has {model.num_classes}")
    return model.eval(), info


def check_task(path: str | Path, info: ModelInfo, task: str) -> None:
    """Raise a ValueError unless the model in ``path`` was trained for ``task``."""
    if info.task != task:
        raise ValueError(f"{path}: its {info.model} was trained to {info.task}, and a model to {task} is needed")


def load_strictly(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load weights that must fit exactly; if they do not, a ValueError says in one line why."""
    for name, own in model.state_dict().items():
        given = state_dict.get(name, own)
        if own.is_floating_point() and not given.is_floating_point():
            raise ValueError(f"{name} holds {str(given.dtype).removeprefix('torch.')}, not floating point numbers")
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        first, *more = str(error).splitlines()[str(error).startswith("Error(s)") :]
        others = f" ({len(more)} more)" if more else ""
        raise ValueError(textwrap.shorten(first, 300, placeholder=" …") + others) from error


def find_model_file(path: str | Path) -> Path:
    """Find the file that `load_model` reads for ``path``; models on the Hub are downloaded (`hub.locate`).

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: as `locate`; or it is an exported file, which holds a graph and no model.
    """
    path = locate(path)
    shipped = SHIPPED_WEIGHTS / f"{path}.safetensors"
    if not path.exists() and path.name == str(path) and shipped.is_file():
        return shipped
    if path.is_dir():
        for name in (BEST, HUB_FILE):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"{path}: no {BEST} in this folder, nor {HUB_FILE}, so it is neither a run folder nor a model of the Hub, "
            "or its run has saved nothing yet"
        )
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED_WEIGHTS.glob("*.safetensors")))
        raise FileNotFoundError(f"{path}: no such run folder or model file (with the package comes: {names})")
    if path.suffix.lower() in (".onnx", ".xml", ".pt2"):  # what `qtvit export` writes
        raise ValueError(f"{path}: an exported model has no layers to look into; give the run it was exported from")
    return path


def read_model_file(
    path: Path, kernel: str | None = None, any_kernel: bool = False
) -> tuple[dict[str, Tensor], ModelInfo]:
    """Read the state dict, under our names, and the description in a file; errors as `load_model`.

    Weights without a description get one by `identify_model`, with their kernel if it is given. If several kernels are
    possible, ``kernel`` is needed, unless ``any_kernel`` says that it does not matter.
    """
    weights = read_weights(path)
    state_dict = weights.tensors
    try:
        if info := described(weights):
            return state_dict, info
        name, model_args = identify_model(state_dict, None if any_kernel else kernel)
        if not any_kernel and kernel is None and len(possible_kernels(state_dict)) > 1:
            why = kernel_mismatch(state_dict, DEFAULT_KERNEL)
            raise ValueError(f"{why}; load_model(path, kernel=…) takes the one that {name} was trained with")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        model: Any = build_model(name, **model_args)
    return rename_keys(state_dict, model.state_dict(), model.cfg), ModelInfo.of_weights(name, model_args)


def described(weights: Weights) -> ModelInfo | None:
    """The description in a model file's metadata, or None; ValueError if this version of qtvit cannot read it."""
    if METADATA_KEY not in weights.metadata:
        return None
    try:
        return ModelInfo(**json.loads(weights.metadata[METADATA_KEY]))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"written by another version of qtvit than this {__version__} ({error})") from error
