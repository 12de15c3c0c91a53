"""Checkpoints of others: their names for the entries of our state dict, and how their weights are fitted to our models.

The authors' release of QT-ViT builds on MIT's EfficientViT and uses its names, with three additions (positional maps,
the shortcut's norm, the kernel's scalar). timm's port of EfficientViT has names of its own.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtvit.ops import KERNELS, get_kernel

from .architectures import Architecture

TIMM_ATTN_EPS = 1e-5
"""The eps that timm's EfficientViT adds to its sums of weights."""

_ATTENTION_NAMES = {
    "scalars.c": "ones_scale1",
    "scalars.": "scalars.",  # of kernels that the release does not have
    "pos_embed": "positional_encoding",
    "qkv.": "qkv.conv.",
    "aggregate.": "aggreg.0.",
    "shortcut_norm.": "bn.",
    "proj.": "proj.",
}
_RELEASED_HEAD = {
    "in_conv.": "op_list.0.",
    "hidden.": "op_list.2.linear.",
    "norm.": "op_list.2.norm.",
    "fc.": "op_list.3.linear.",
}
_TIMM_HEAD = {
    "in_conv.": "in_conv.",
    "hidden.": "classifier.0.",
    "norm.": "classifier.1.",
    "fc.": "classifier.4.",
}
_NEW_PART = re.compile(r"\.attn\.(scalars\.\w+|pos_embed|shortcut_norm\.\w+)$")


def released_name(key: str, cfg: Architecture) -> str:
    """The name that our state dict's entry ``key`` has in the authors' checkpoints and in MIT's.

    In these, family B's stem stands apart from the stages, and family L's is the first stage.
    """
    if key.startswith("head."):
        return "head." + _replace_prefix(key.removeprefix("head."), _RELEASED_HEAD)
    stage, block, name = _split(key)
    if not _is_family_b(cfg):
        prefix = f"backbone.stages.{stage}"
    else:
        prefix = "backbone.input_stem" if stage == 0 else f"backbone.stages.{stage - 1}"
    return f"{prefix}.op_list.{block}.{_in_block(name, is_first=block == 0, is_stem=stage == 0)}"


def timm_name(key: str, cfg: Architecture) -> str:
    """The name that our state dict's entry ``key`` has in that of timm's ``efficientvit_*``."""
    if key.startswith("head."):
        return "head." + _replace_prefix(key.removeprefix("head."), _TIMM_HEAD)
    stage, block, name = _split(key)
    if stage > 0:
        prefix = f"stages.{stage - 1}.blocks.{block}"
    else:
        prefix = "stem.in_conv" if block == 0 else f"stem.res{block - 1}"
    return f"{prefix}.{_in_block(name, is_first=block == 0, is_stem=stage == 0)}"


def _split(key: str) -> tuple[int, int, str]:
    """The stage, the block and the name within the block of an entry of our state dict."""
    match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", key)
    if match is None:
        raise ValueError(f"{key!r} is no entry of a QTViT state dict")
    return int(match[1]), int(match[2]), match[3]


def _is_family_b(cfg: Architecture) -> bool:
    """Whether the stem is family B's, with residual DSConv blocks, which the release counts apart from the stages."""
    return cfg.stages[0].block == "ds"


def _in_block(name: str, *, is_first: bool, is_stem: bool) -> str:
    if name.startswith("attn."):
        return "context_module.main." + _replace_prefix(name.removeprefix("attn."), _ATTENTION_NAMES)
    if name.startswith("local."):
        return name.replace("local.", "local_module.main.", 1)
    return f"main.{name}" if is_first and not is_stem else name


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"no released counterpart for {name!r}")


def source_of(names: Iterable[str]) -> str:
    """Where a checkpoint with these names comes from: "qtvit", "release", "mit", "timm", or "" if unknown."""
    names = set(names)
    if "stem.in_conv.conv.weight" in names:
        return "timm"
    if any(name.startswith("backbone.") for name in names):
        additions = re.compile(r"\.(positional_encoding|ones_scale1|scalars\.\w+|main\.bn\.\w+)$")
        return "release" if any(additions.search(name) for name in names) else "mit"
    return "qtvit" if "stages.0.0.conv.weight" in names else ""


def own_names(names: Iterable[str], own: Iterable[str], cfg: Architecture) -> dict[str, str]:
    """Our name for each of ``names``, which may be ours, the release's, MIT's or timm's; unknown names are kept.

    Args:
        names: names in the checkpoint.
        own: names in our model's state dict.
        cfg: the model's architecture.
    """
    ours = {}
    for key in own:
        for name_of in (released_name, timm_name):
            with contextlib.suppress(ValueError):  # a module that a user has added to the model
                ours[name_of(key, cfg)] = key
    return {name: ours.get(name, name) for name in names}


def rename_keys(state_dict: Mapping[str, Any], own: Iterable[str], cfg: Architecture) -> dict[str, Any]:
    """A copy of ``state_dict`` under our names; arguments as for `own_names`.

    Raises:
        ValueError: two entries have the same name of ours.
    """
    renamed: dict[str, Any] = {}
    names = own_names(state_dict, own, cfg)
    for key, value in state_dict.items():
        if names[key] in renamed:
            raise ValueError(f"{names[key]} is there under two names, of which one is {key}")
        renamed[names[key]] = value
    return renamed


def take_over(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], kernel: str) -> dict[str, Tensor]:
    """Adapt weights (under our names) that were trained with another attention to a model's own attention.

    What both have is taken over. Parts of the attention that only the model has start at values that change its output
    least: positional maps at 0, shortcuts with an output of 0 (GELU(0) = 0, with a gradient that is not), scalars at
    their initial values. Parts of the attention that only the weights have are left out.

    Args:
        state_dict: the weights.
        own: the model's state dict.
        kernel: the model's attention kernel.
    """
    scalars = get_kernel(kernel).scalars
    taken = {key: value for key, value in state_dict.items() if key in own or not _NEW_PART.search(key)}
    for key, value in own.items():
        if key not in taken and (part := _NEW_PART.search(key)):
            qkv = state_dict.get(f"{key[: part.start()]}.attn.qkv.weight")
            if qkv is not None:  # otherwise the weights lack this block altogether
                name = key.rpartition(".")[2]
                start = 1.0 if name == "running_var" else scalars.get(name, 0.0)
                dtype = qkv.dtype if value.is_floating_point() else value.dtype
                taken[key] = torch.full(value.shape, start, dtype=dtype, device=qkv.device)
    return taken


def fit_weights(
    state_dict: Mapping[str, Any], own: Mapping[str, Tensor], cfg: Architecture, kernel: str
) -> dict[str, Any]:
    """Make weights under any known names loadable by a model of ours.

    They get our names, positional maps are resized to the model's size as the forward pass would resize them, and
    weights of EfficientViT (MIT's or timm's) are completed by `take_over`.

    Args:
        state_dict: the weights, under our names, the release's, MIT's or timm's.
        own: the model's state dict.
        cfg, kernel: the model's architecture and attention kernel.

    Raises:
        ValueError: two entries have the same name of ours.
    """
    fitted = rename_keys(state_dict, own, cfg)
    if source_of(state_dict) in ("mit", "timm"):
        fitted = take_over(fitted, own, kernel)
    for key, value in own.items():
        given = fitted.get(key)
        if key.endswith("pos_embed") and given is not None and given.ndim == 4 and given.shape[2:] != value.shape[2:]:
            precise = given.to(torch.promote_types(given.dtype, torch.float32))
            resized = F.interpolate(precise, size=value.shape[2:], mode="bicubic", align_corners=False)
            fitted[key] = resized.to(given.dtype)
    return fitted


def kernel_scalars(names: Iterable[str]) -> set[str]:
    """The kernel's learnable scalars that occur in the names of a state dict, ours or the release's."""
    found = (re.search(r"(?:^|\.)(?:scalars\.(\w+)|ones_scale1)$", name) for name in names)
    return {match[1] or "c" for match in found if match}


def kernels_with(scalars: set[str]) -> list[str]:
    """The kernels whose learnable scalars are exactly these."""
    return [name for name, spec in KERNELS.items() if set(spec.scalars) == scalars]


def kernel_mismatch(names: Iterable[str], kernel: str) -> str:
    """The error message if weights with these names belong to another kernel than ``kernel``.

    It is "" if their scalars are those of ``kernel``, or if they contain no attention.
    """
    names = list(names)
    own, expected = kernel_scalars(names), set(get_kernel(kernel).scalars)
    if own == expected or not any(".qkv." in name for name in names):
        return ""
    wrong = [f"{name} is missing" for name in sorted(expected - own)]
    wrong += [f"{name} is not of this kernel" for name in sorted(own - expected)]
    return (
        f"weights of a model with another kernel than {kernel} (of its scalars, {', '.join(wrong)}); "
        f"kernels with such weights: {', '.join(kernels_with(own)) or 'none of this version'}"
    )
