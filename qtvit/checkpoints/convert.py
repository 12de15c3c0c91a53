"""Converting the weights of others to model files, and ours to the authors' format."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qtvit.errors import some, unknown_name
from qtvit.files import open_folder, replacing
from qtvit.models import ARCHITECTURES, build_model, check_img_size
from qtvit.models.foreign import fit_weights, kernel_mismatch, own_names, released_name, source_of

from .model_file import ModelInfo, described, find_model_file, load_strictly
from .weights import DEFAULT_KERNEL, Weights, identify_model, possible_kernels, read_weights

SOURCES = {
    "qtvit": "a model of qtvit",
    "release": "the authors' release of QT-ViT",
    "mit": "MIT's EfficientViT",
    "timm": "timm's EfficientViT",
}


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and how they were made. Tensors are listed by our names.

    Attributes:
        state_dict: of a new model ``info.model`` that has loaded the weights strictly.
        info: description for the model file.
        mapped: name in the file of each tensor that was taken from it.
        transformed: changes of such tensors.
        added: tensors that the source's attention does not have, at the values that disturb least.
        remarks: further information for the user.
    """

    state_dict: dict[str, Tensor]
    info: ModelInfo
    mapped: dict[str, str]
    transformed: dict[str, str]
    added: list[str]
    remarks: list[str]

    def report(self, verbose: bool = False) -> str:
        """The numbers of tensors that were mapped, transformed and added; with ``verbose``, every tensor."""
        with torch.device("meta"):
            num_params = sum(p.numel() for p in build_model(self.info.model, **self.info.model_args).parameters())
        what = ", ".join(f"{name}={value}" for name, value in self.info.model_args.items())
        lines = [
            f"{self.info.source} -> {self.info.model} ({what}; {num_params / 1e6:.2f} M parameters)",
            f"  mapped       {len(self.mapped):4d}",
            f"  transformed  {len(self.transformed):4d}  {_counts(self.transformed.values())}",
            f"  added        {len(self.added):4d}  {_counts(_part(name) for name in self.added)}",
            "  missing         0",  # the new model has loaded the weights strictly
            "  unexpected      0",
        ]
        if verbose:
            for name, tensor in self.state_dict.items():
                origin = f"<- {self.mapped[name]}" if name in self.mapped else "added"
                done = f"  ({self.transformed[name]})" if name in self.transformed else ""
                lines.append(f"    {name}  {'x'.join(map(str, tensor.shape)) or 'scalar'}  {origin}{done}")
        return "\n".join(line.rstrip() for line in [*lines, *(f"  {remark}" for remark in self.remarks)])


def convert(
    src: str | Path,
    *,
    model: str | None = None,
    kernel: str | None = None,
    img_size: Sequence[int] | None = None,
    ema: bool = False,
    classes: Sequence[str] | None = None,
) -> Conversion:
    """Convert the weights in ``src`` to our names, and check them by loading them strictly.

    Weights of the release and of qtvit keep their architecture. EfficientViT's become a QT-ViT: all of them are used,
    positional maps start at 0, and shortcuts output 0. With ``kernel="relu"`` the outputs are those of the source;
    with another kernel, the weights are a start for fine-tuning.

    Args:
        src: weights file (see `read_weights`), model file, run folder, or name of a model that comes with the package.
        model: the model that the weights must be of; default: found by names and shapes.
        kernel: of the model to write; default: "taylor2" for EfficientViT's weights, and otherwise the kernel they were
            trained with, which must be given if several have the same scalars.
        img_size: (H, W) to resize the positional maps for; default: theirs.
        ema: take the moving average in a training checkpoint.
        classes: names of the classes, in the order of the outputs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or not exactly those of one model.
    """
    if model is not None and model not in ARCHITECTURES:
        raise unknown_name("model", model, ARCHITECTURES)
    path = find_model_file(src)
    weights = read_weights(path, ema)
    try:
        return _convert(Path(src).name, weights, model, kernel, img_size, classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(
    file: str,
    weights: Weights,
    name: str | None,
    kernel: str | None,
    img_size: Sequence[int] | None,
    classes: Sequence[str] | None,
) -> Conversion:
    """Convert as `convert` does; the messages of ValueErrors lack the path."""
    remarks = list(weights.remarks)
    source = source_of(weights.tensors)
    is_efficientvit = source in ("mit", "timm")
    if info := described(weights):
        described_as = info.model.split(".")[0]
        if described_as not in ARCHITECTURES:
            raise ValueError(f"holds {info.model}, a model of timm's; there is nothing to convert")
        if name not in (None, described_as):
            raise ValueError(f"described as {info.model}, not {name}")
        kernels = [info.model_args.get("kernel", DEFAULT_KERNEL)]
    else:
        kernels = possible_kernels(weights.tensors)
        known = None if is_efficientvit else kernel
        info = ModelInfo.of_weights(*identify_model(weights.tensors, known, name))

    args = dict(info.model_args)
    if is_efficientvit:
        kernel = kernel or DEFAULT_KERNEL
        for part in ("kernel", "ape", "shortcut"):
            args.pop(part, None)
        if kernel != DEFAULT_KERNEL:
            args["kernel"] = kernel
        if kernel != "relu":
            args.pop("attn_eps", None)
            remarks.append(
                f"kernel relu -> {kernel}: the outputs are not EfficientViT's until the model is fine-tuned (with "
                "--kernel relu they are); the recipe swap/efficientvit_to_qtvit does that, from the source itself"
            )
    elif kernel is None and len(kernels) > 1:
        why = kernel_mismatch(weights.tensors, DEFAULT_KERNEL)
        raise ValueError(f"{why}; --kernel says which they were trained with")
    elif kernel is not None and kernel not in kernels:
        raise ValueError(f"trained with kernel {' or '.join(kernels)}, not {kernel}")
    if img_size is not None:
        args["img_size"] = list(img_size)
        # The scores are dropped, as they were measured at another size.
        info = replace(info, preprocess={**info.preprocess, "size": list(img_size)}, metrics={})
    if classes is not None:
        if len(classes) != args.get("num_classes", len(info.classes)):
            raise ValueError(f"has {len(info.classes)} outputs, but {len(classes)} classes are named")
        info = replace(info, classes=list(classes))
    info = replace(info, model_args=args, source=info.source or f"{file}, {SOURCES.get(source, SOURCES['qtvit'])}")

    target: Any = build_model(info.model, **args)
    if img_size is not None:
        check_img_size(target, (img_size[0], img_size[1]))
    fitted = fit_weights(weights.tensors, target.state_dict(), target.cfg, target.kernel)
    load_strictly(target, fitted)
    state_dict = target.state_dict()
    if broken := [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]:
        raise ValueError(f"NaN or infinity in {len(broken)} tensors: {some(broken, 3)}")
    mapped = {ours: theirs for theirs, ours in own_names(weights.tensors, state_dict, target.cfg).items()}
    changes = {ours: _change(weights.tensors[theirs], state_dict[ours]) for ours, theirs in mapped.items()}
    transformed = {name: change for name, change in changes.items() if change}
    added = [name for name in state_dict if name not in mapped]
    return Conversion(state_dict, info, mapped, transformed, added, remarks)


def save_released(path: Path, state_dict: dict[str, Tensor], info: ModelInfo) -> None:
    """Write weights of ours with the authors' names, for their code to load; in a .pt file, under ``state_dict``.

    Raises:
        ValueError: the model has another kernel than the authors', or lacks a part that theirs has.
        OSError: the file cannot be written.
    """
    for name, only in (("kernel", DEFAULT_KERNEL), ("ape", True), ("shortcut", True), ("attn_eps", None)):
        if info.model_args.get(name, only) != only:
            own = info.model_args[name]
            raise ValueError(f"{path} not written: the authors' code has {name}={only} alone, this model {name}={own}")
    cfg = ARCHITECTURES[info.model.split(".")[0]]
    released = {released_name(name, cfg): tensor.contiguous() for name, tensor in state_dict.items()}
    open_folder(path.parent)
    with replacing(path) as temporary:
        try:
            if path.suffix.lower() == ".safetensors":
                save_file(released, temporary)
            else:
                torch.save({"state_dict": released}, temporary)
        except (SafetensorError, RuntimeError) as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def _change(before: Tensor, after: Tensor) -> str:
    """What was done to a tensor apart from renaming it; empty if nothing was."""
    changes = []
    if before.dtype != after.dtype:
        changes.append(f"{before.dtype} -> {after.dtype}".replace("torch.", ""))
    if before.shape != after.shape:
        changes.append("map resized " + " -> ".join("x".join(map(str, t.shape[2:])) for t in (before, after)))
    return ", ".join(changes)


def _part(name: str) -> str:
    """The kind of a tensor in ``Conversion.added``."""
    if "pos_embed" in name:
        return "positional maps at 0"
    return "tensors of silent shortcuts" if "shortcut_norm" in name else "kernel scalars"


def _counts(items: Iterable[str]) -> str:
    return ", ".join(f"{count} {item}" for item, count in Counter(items).items())
