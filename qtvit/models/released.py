"""The names of our state dict's entries in the authors' checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .qtvit import Architecture, QTViT

_ATTENTION_NAMES = {
    "scalars.c": "ones_scale1",
    "scalars.": "scalars.",  # of kernels that were not released
    "pos_embed": "positional_encoding",
    "qkv.": "qkv.conv.",
    "aggregate.": "aggreg.0.",
    "shortcut_norm.": "bn.",
    "proj.": "proj.",
}
_HEAD_NAMES = {
    "in_conv.": "head.op_list.0.",
    "hidden.": "head.op_list.2.linear.",
    "norm.": "head.op_list.2.norm.",
    "fc.": "head.op_list.3.linear.",
}


def released_name(key: str, cfg: Architecture) -> str:
    """The name in the authors' checkpoints of the entry ``key`` of our state dict.

    Their family B counts the stem apart from the stages, their family L does not.
    """
    if key.startswith("head."):
        return _replace_prefix(key.removeprefix("head."), _HEAD_NAMES)
    match = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", key)
    if match is None:
        raise ValueError(f"{key!r} is no entry of a QTViT state dict")
    stage, block, name = int(match[1]), int(match[2]), match[3]
    if cfg.stages[0].block == "ds":
        prefix = "backbone.input_stem" if stage == 0 else f"backbone.stages.{stage - 1}"
    else:
        prefix = f"backbone.stages.{stage}"
    if name.startswith("attn."):
        name = "context_module.main." + _replace_prefix(name.removeprefix("attn."), _ATTENTION_NAMES)
    elif name.startswith("local."):
        name = name.replace("local.", "local_module.main.", 1)
    elif block == 0 and stage > 0:
        name = f"main.{name}"
    return f"{prefix}.op_list.{block}.{name}"


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"no released counterpart for {name!r}")


def rename_keys(state_dict: Mapping[str, Any], model: QTViT) -> dict[str, Tensor]:
    """A state dict with our names from one with ours or with the release's; names that are neither stay as they are."""
    ours = {released_name(key, model.cfg): key for key in model.state_dict()}
    return {ours.get(key, key): value for key, value in state_dict.items()}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: QTViT) -> dict[str, Tensor]:
    """What ``model`` can load of a checkpoint: our names, and positional maps resized to its own, as at run time."""
    renamed = rename_keys(state_dict.get("state_dict", state_dict), model)
    for key, own in model.state_dict().items():
        if key.endswith("pos_embed") and key in renamed and renamed[key].shape[2:] != own.shape[2:]:
            renamed[key] = F.interpolate(renamed[key].float(), size=own.shape[2:], mode="bicubic", align_corners=False)
    return renamed
