"""The model file: weights as safetensors, and in its metadata all that is needed to use them."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtvit.files import temporary_name
from qtvit.models import build_model
from qtvit.version import __version__

METADATA_KEY = "qtvit"
WEIGHT_SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of ``timm.create_model`` that say where weights come from; a model file holds its own."""
BEST = "best.safetensors"
"""Name of the model file in a run folder."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of its model.

    Attributes:
        model: name, as for ``timm.create_model``.
        model_args: the arguments it was built with.
        classes: names in the order of the outputs.
        preprocess: fields of ``qtvit.data.Preprocess``.
        metrics: scores on the held-out images.
        split: how images were held out from training, see `qtvit.data.LabelledImages`; empty if they came apart.
        task: "classify".
        version: of the qtvit that wrote it.
    """

    model: str
    model_args: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    task: str = "classify"
    version: str = ""


def save_model(path: Path, state_dict: dict[str, Tensor], info: ModelInfo) -> None:
    """Write the model file in one step: a crash leaves the old file or the new one."""
    model_args = {name: value for name, value in info.model_args.items() if name not in WEIGHT_SOURCES}
    info = dataclasses.replace(info, model_args=model_args, version=__version__)
    temporary = temporary_name(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(dataclasses.asdict(info))})
    os.replace(temporary, path)


def load_model(path: str | Path, **model_args: Any) -> tuple[nn.Module, ModelInfo]:
    """The model in ``path``, a model file or a run folder, in evaluation mode on the CPU.

    ``model_args`` are added to those it was built with, or replace them.

    Raises:
        FileNotFoundError: there is no such file, or no model file in the run folder.
        ValueError: it is no model file of ours, or its weights do not fit its model.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise FileNotFoundError(
                f"{path}: no {BEST} in this folder, so it is not a run folder, or its run has saved nothing yet"
            )
        path = path / BEST
    state_dict, info = read_model_file(path)
    info = dataclasses.replace(info, model_args={**info.model_args, **model_args})
    model = build_model(info.model, **info.model_args)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        first, *more = str(error).splitlines()[1:]
        raise ValueError(f"{path}: its weights do not fit {info.model}: {first.strip()} ({len(more)} more)") from error
    return model.eval(), info


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelInfo]:
    """The state dict and the description in a model file, without building the model."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such run folder or model file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
        state_dict = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    if metadata is None:
        raise ValueError(
            f"{path}: a safetensors file, but not one that `qtvit train` wrote (no '{METADATA_KEY}' metadata)"
        )
    try:
        return state_dict, ModelInfo(**json.loads(metadata))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: written by another version of qtvit than this {__version__} ({error})") from error
