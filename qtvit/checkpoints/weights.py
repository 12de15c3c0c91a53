"""Files that hold weights alone: of the authors' release, or a state dict of a model of ours."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qtvit.models import ARCHITECTURES, QTViT, build_model
from qtvit.models.released import rename_keys
from qtvit.ops import KERNELS, get_kernel

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Files that torch.save wrote; all others are taken for safetensors."""
DEFAULT_KERNEL = next(iter(KERNELS))
"""Of a model that is built without the argument."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in one that ``torch.save`` wrote, whose code, if any, is never run.

    A dict that has it under ``state_dict``, as the release does, is unwrapped, and prefixes that DataParallel and
    torch.compile put before the names are taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of either kind, or holds something else than tensors by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    content: Any = _torch_load(path) if path.suffix.lower() in TORCH_SUFFIXES else _safetensors_load(path)
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        raise ValueError(f"{path}: the state of a training run; give its run folder, or best.safetensors in there")
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds no state dict, but {_kind(content)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: holds no state dict: {name!r} is {_kind(value)}, not a tensor")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in content.items()}


def kernel_scalars(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Names of the learnable scalars of the attention kernel, under our names or the release's."""
    found = (re.search(r"(?:^|\.)(?:scalars\.(\w+)|ones_scale1)$", key) for key in state_dict)
    return {match[1] or "c" for match in found if match}


def kernel_mismatch(state_dict: Mapping[str, Tensor], kernel: str) -> str:
    """What says that the weights are of another kernel than ``kernel``, by their scalars; nothing if they may be."""
    own, expected = kernel_scalars(state_dict), set(get_kernel(kernel).scalars)
    if own == expected:
        return ""
    wrong = [f"{name} is missing" for name in sorted(expected - own)]
    wrong += [f"{name} is not of this kernel" for name in sorted(own - expected)]
    return (
        f"weights of a model with another kernel than {kernel} (of its scalars, {', '.join(wrong)}); "
        f"kernels with such weights: {', '.join(_kernels_with(own)) or 'none of this version'}"
    )


def _kernels_with(scalars: set[str]) -> list[str]:
    return [name for name, spec in KERNELS.items() if set(spec.scalars) == scalars]


def identify_model(state_dict: Mapping[str, Tensor], kernel: str | None = None) -> tuple[str, dict[str, Any]]:
    """The model whose weights these are, by names (ours or the release's) and shapes: its name and its arguments.

    The arguments are ``num_classes``, and ``in_chans``, ``img_size`` and ``kernel`` where they are not the model's
    default. The kernel is told by its scalars; where several kernels have the same, it is the default or has to be
    given.

    Raises:
        ValueError: the weights are not exactly those of one of our models, with what is wrong for the closest; or they
            are of another ``kernel``, or of one that cannot be told.
    """
    candidates = _kernels_with(kernel_scalars(state_dict))
    assumed = kernel or next(iter(candidates), DEFAULT_KERNEL)
    kernel_args = {} if assumed == DEFAULT_KERNEL else {"kernel": assumed}
    differences: dict[str, list[str]] = {}
    for name in ARCHITECTURES:
        with torch.device("meta"):
            model: Any = build_model(name, **kernel_args)
        shapes = _shapes(rename_keys(state_dict, model))
        model_args = {**_model_args(shapes, model), **kernel_args}
        names = [key for key in model.state_dict() if model_args["num_classes"] or not key.startswith("head.fc.")]
        wrong = [f"{key} is missing" for key in names if key not in shapes]
        wrong += [f"{key} is not of this model" for key in shapes if key not in names]
        if not wrong:
            with torch.device("meta"):
                expected = _shapes(build_model(name, **model_args).state_dict())
            wrong = [f"{key} is {shapes[key]}, not {shape}" for key, shape in expected.items() if shapes[key] != shape]
            if not wrong and kernel is None and len(candidates) > 1 and assumed != DEFAULT_KERNEL:
                why = kernel_mismatch(state_dict, DEFAULT_KERNEL)
                raise ValueError(f"{why}; load_model(path, kernel=…) takes the one that {name} was trained with")
            if not wrong:
                return name, model_args
        if shapes.keys() & set(names):
            differences[name] = wrong
    if not differences:
        names = [*state_dict][:3]
        raise ValueError(f"not the weights of a model of ours; the first names in it are {', '.join(names)}")
    if mismatch := kernel_mismatch(state_dict, assumed):
        raise ValueError(mismatch)
    closest, wrong = min(differences.items(), key=lambda item: len(item[1]))
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ValueError(f"not the weights of a model of ours; the closest is {closest}, but {'; '.join(wrong[:3])}{more}")


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def _model_args(shapes: Mapping[str, tuple[int, ...]], model: QTViT) -> dict[str, Any]:
    """The arguments that the shapes speak of, if the weights are those of ``model`` with others than its own."""
    model_args: dict[str, Any] = {"num_classes": 0}
    match shapes.get("head.fc.weight"):
        case (num_classes, _):
            model_args["num_classes"] = num_classes
    match shapes.get("stages.0.0.conv.weight"):
        case (_, in_chans, _, _) if in_chans != model.in_chans:
            model_args["in_chans"] = in_chans
    first_map, default = next((key, value.shape) for key, value in model.state_dict().items() if "pos_embed" in key)
    match shapes.get(first_map):
        case (_, _, height, width) if (height, width) != default[2:]:
            reduction = model.feature_info[int(first_map.split(".")[1])]["reduction"]
            model_args["img_size"] = [height * reduction, width * reduction]
    return model_args


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{culprit[1]}, which is not loaded as it could run code" if culprit else "no weights of PyTorch"
        raise ValueError(f"{path}: holds {what}; expected a state dict of tensors") from error
    except Exception as error:  # what else a file that is cut short or of another kind makes of torch.load
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a weights file of PyTorch ({reason})") from error


def _safetensors_load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def _kind(value: object) -> str:
    return "an empty dict" if isinstance(value, Mapping) and not value else f"of type {type(value).__name__}"
