"""Files of weights without a description: of the authors' release, of EfficientViT, or of a model of qtvit."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtvit.errors import some
from qtvit.models import ARCHITECTURES, QTViT, build_model
from qtvit.models.foreign import TIMM_ATTN_EPS, kernel_mismatch, kernel_scalars, kernels_with, rename_keys, source_of
from qtvit.ops import KERNELS, get_kernel

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of files that ``torch.save`` wrote; all others are read as safetensors."""
DEFAULT_KERNEL = next(iter(KERNELS))
"""The kernel of a model that is built without the argument."""
USUAL = ("state_dict", "model")
"""Entries under which training checkpoints of the release, MIT and timm keep the weights."""
AVERAGES = ("ema", "state_dict_ema", "model_ema")
"""Entries under which they keep the moving average of the weights."""


@dataclass
class Weights:
    """The content of a file of weights.

    Attributes:
        tensors: the state dict, without prefixes that wrappers put before its names.
        remarks: what else the file held, and what was done about it.
        metadata: of a safetensors file.
    """

    tensors: dict[str, Tensor]
    remarks: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(path: Path, ema: bool = False) -> Weights:
    """Read the state dict in a .safetensors file or in one that ``torch.save`` wrote; code in it never runs.

    A state dict under ``state_dict`` (the release, MIT), ``model`` (timm) or another entry is unwrapped, and prefixes
    of DataParallel, torch.compile and Lightning are removed from its names. With ``ema``, the moving average under one
    of `AVERAGES` is read instead.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of neither kind, holds anything but tensors by name, or has no moving average.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    content: Any
    metadata: dict[str, str] = {}
    try:
        if path.suffix.lower() in TORCH_SUFFIXES:
            content = _torch_load(path)
        else:
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        tensors, remarks = _unpack(content, ema)
    except SafetensorError as error:
        raise ValueError(f"{path}: {_look(path)}; expected a safetensors file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    stripped = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        raise ValueError(
            f"{path}: holds tensors of the same names with and without the prefix of a wrapper (module., …)"
        )
    if stripped.keys() != tensors.keys():
        remarks.append("prefixes of wrappers (module., _orig_mod., model.) taken off the names")
    return Weights(stripped, remarks, metadata)


def _unpack(content: Any, ema: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file's content, which may be a training checkpoint, and remarks."""
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"holds no state dict, but {_kind(content)}")
    if "pytorch-lightning_version" in content and "qtvit" in content:
        raise ValueError("the state of a training run; give its run folder, or best.safetensors in there")
    if ema:
        return _averaged(content)
    if _is_state_dict(content):
        return dict(content), []
    inner = [name for name, value in content.items() if name not in AVERAGES and _is_state_dict(value)]
    if not inner:
        strange = {
            name: value for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))
        }
        found = some([f"{name!r} ({_kind(value)})" for name, value in strange.items()])
        hint = "; --ema takes the moving average" if strange.keys() & set(AVERAGES) else ""
        raise ValueError(f"holds no state dict, which has tensors by name alone: there is {found}{hint}")
    if len(inner) > 1 and not set(inner) & set(USUAL):
        raise ValueError(f"holds several state dicts: {some(inner)}; save the one that is meant to a file of its own")
    name = next((name for name in USUAL if name in inner), inner[0])
    left_out = [str(key) for key in content if key != name]
    average = next((key for key in AVERAGES if key in content), None)
    hint = f" ({average!r} is a moving average: --ema takes that)" if average else ""
    remark = f"weights under {name!r} taken; left out: {', '.join(left_out)}{hint}"
    return dict(content[name]), [remark] if left_out else []


def _averaged(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The moving average in a training checkpoint, which may lie in a dict by decay, and a remark."""
    name = next((name for name in AVERAGES if isinstance(content.get(name), Mapping)), None)
    if name is None:
        raise ValueError(f"holds no moving average of the weights (none of {', '.join(AVERAGES)})")
    if _is_state_dict(content[name]):
        return dict(content[name]), [f"moving average under {name!r} taken"]
    by_decay = {decay: weights for decay, weights in content[name].items() if _is_state_dict(weights)}
    if len(by_decay) != 1:
        raise ValueError(f"holds moving averages of {len(by_decay)} decays ({some(list(by_decay))}), not of one")
    decay, weights = next(iter(by_decay.items()))
    return dict(weights), [f"moving average under {name!r}, of decay {decay}, taken"]


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def identify_model(
    state_dict: Mapping[str, Tensor], kernel: str | None = None, name: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Find the model that weights belong to by their names (anybody's) and shapes: its name and its arguments.

    The arguments are ``num_classes`` and those that differ from the model's default: ``in_chans``, ``img_size``,
    ``kernel``, ``ape``, ``shortcut``, and timm's ``attn_eps``. The kernel is recognised by its scalars. If several have
    the same, it is EfficientViT's for weights of EfficientViT, and otherwise the first of `possible_kernels`.
    ``kernel`` and ``name`` say which kernel and model are expected, if that is known.

    Raises:
        ValueError: the weights are not exactly those of one of our models (the message compares them with the closest),
            or not of the expected kernel or model.
    """
    kernels = possible_kernels(state_dict)
    if kernel is not None and get_kernel(kernel) and source_of(state_dict) in ("mit", "timm") and kernel not in kernels:
        raise ValueError(f"the weights of an EfficientViT, whose kernel is relu, not {kernel}")
    assumed = kernel or next(iter(kernels), DEFAULT_KERNEL)
    parts = _attention_args(state_dict, assumed)
    differences: dict[str, list[list[str]]] = {}
    for candidate in ARCHITECTURES if name is None else [name]:
        with torch.device("meta"):
            model: Any = build_model(candidate, **parts)
        shapes = _shapes(rename_keys(state_dict, model.state_dict(), model.cfg))
        model_args = {**_model_args(shapes, model), **parts}
        with torch.device("meta"):
            expected = _shapes(build_model(candidate, **model_args).state_dict())
        missing = [key for key in expected if key not in shapes]
        unexpected = [key for key in shapes if key not in expected]
        other = [f"{k} {shapes[k]}, not {shape}" for k, shape in expected.items() if shapes.get(k, shape) != shape]
        if not (missing or unexpected or other):
            return candidate, model_args
        if shapes.keys() & expected.keys():
            differences[candidate] = [missing, unexpected, other]
    if not differences:
        whose = "a model of ours" if name is None else name
        raise ValueError(f"not the weights of {whose}; the first names in it are {', '.join([*state_dict][:3])}")
    if mismatch := kernel_mismatch(state_dict, assumed):
        raise ValueError(mismatch)
    closest, lists = min(differences.items(), key=lambda item: sum(map(len, item[1])))
    kinds = zip(("missing", "unexpected", "of another shape"), lists, strict=True)
    wrong = "; ".join(f"{kind} {len(found)}: {some(found, 3)}" for kind, found in kinds if found)
    hint = "a model of ours; the closest is " if name is None else ""
    raise ValueError(f"not the weights of {hint}{closest} ({wrong})")


def possible_kernels(names: Iterable[str]) -> list[str]:
    """The kernels that weights of these names may have been trained with."""
    names = set(names)
    return ["relu"] if source_of(names) in ("mit", "timm") else kernels_with(kernel_scalars(names))


def _attention_args(names: Iterable[str], kernel: str) -> dict[str, Any]:
    """The attention's arguments that differ from the default, by the names of the weights."""
    names = set(names)
    args: dict[str, Any] = {} if kernel == DEFAULT_KERNEL else {"kernel": kernel}
    for part, name in (("ape", r"(pos_embed|positional_encoding)$"), ("shortcut", r"(shortcut_norm|main\.bn)\.\w+$")):
        if not any(re.search(name, key) for key in names):
            args[part] = False
    return {**args, "attn_eps": TIMM_ATTN_EPS} if source_of(names) == "timm" else args


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def _model_args(shapes: Mapping[str, tuple[int, ...]], model: QTViT) -> dict[str, Any]:
    """``num_classes``, and ``in_chans`` and ``img_size`` if they are not those of ``model``, by the weights' shapes."""
    model_args: dict[str, Any] = {"num_classes": 0}
    match shapes.get("head.fc.weight"):
        case (num_classes, _):
            model_args["num_classes"] = num_classes
    match shapes.get("stages.0.0.conv.weight"):
        case (_, in_chans, _, _) if in_chans != model.in_chans:
            model_args["in_chans"] = in_chans
    for key, value in model.state_dict().items():
        match shapes.get(key):
            case (_, _, height, width) if key.endswith("pos_embed") and (height, width) != value.shape[2:]:
                reduction = model.feature_info[int(key.split(".")[1])]["reduction"]
                return {**model_args, "img_size": [height * reduction, width * reduction]}
    return model_args


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything on damaged files and those of other kinds
        if culprit := isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"holds {culprit[1]}, which is not loaded as it could run code; expected a state dict of tensors. If "
                "you trust the file, load it with torch.load(file, weights_only=False) and save the state dict alone"
            ) from error
        raise ValueError(f"{_look(path)}; expected a state dict of tensors that torch.save wrote") from error


def _look(path: Path) -> str:
    """Describe a file that is not what its suffix says."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file (0 bytes)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file (git lfs pull gets it)"
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive, not weights"
        if any(name.endswith("data.pkl") for name in names):
            return "a file of torch.save that is damaged or, by its content, not one of weights"
        return f"a zip archive of {some(names)}"
    if start[8:9] == b"{":
        return "a safetensors file by its content, or what is left of one"
    if text := re.fullmatch(rb"[\s!-~]+", start[:40]):
        return f"a text file that begins with {text[0].decode()!r}"
    return "a file that is damaged, cut short or of another kind"


def _kind(value: object) -> str:
    return "an empty dict" if isinstance(value, Mapping) and not value else f"of type {type(value).__name__}"
