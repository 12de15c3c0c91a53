"""Examine a model on real images: the entry point of the doctor."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from qtvit import console
from qtvit.checkpoints import load_model
from qtvit.data import ImageSource, Preprocess, open_image
from qtvit.data.folders import all_images
from qtvit.deploy.artifact import format_of
from qtvit.device import resolve_device
from qtvit.models import build_model
from qtvit.models.build import check_img_size
from qtvit.tasks.classify.predict import ClassPredictor

from .report import Report
from .runs import run_all

Model = ClassPredictor | nn.Module | str | Path
"""A predictor, a network, what `qtvit.checkpoints.load_model` takes, or a model name of ours or timm's."""


def examine(
    model: Model,
    data: str | Path | Sequence[ImageSource],
    *,
    num_images: int = 64,
    batch_size: int = 16,
    img_size: tuple[int, int] | None = None,
    device: str = "auto",
) -> Report:
    """Find the operations of a model that overflow or lose precision in fp16, bf16 and int8, on real images.

    The model runs about a dozen times on all images, and once more for every convolution, linear layer and matrix
    product, to measure the model's outputs when that one alone is in int8. ``model`` itself is not changed.

    Args:
        model: what to examine. A model given by name has random weights, which the report says.
        data: a folder of images, packed or not, "digits", or images.
        num_images: number of images to take, evenly from all over the folder.
        batch_size: images at a time.
        img_size: (H, W); default: the model's own.
        device: see `qtvit.device.resolve_device`; a predictor stays where it is.

    Raises:
        FileNotFoundError: no such model or folder.
        ValueError: no images, one that cannot be read, a size that does not fit the model, a model that does not give
            a tensor for RGB images or computes nothing, an exported file; as `qtvit.checkpoints.load_model`.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images and batch_size must be 1 or more, got {num_images} and {batch_size}")
    network, preprocess, name, is_random = _resolve(model)
    if (in_chans := getattr(network, "in_chans", 3)) != 3:
        raise ValueError(f"{name}: for images of {in_chans} channels, and images are read as RGB")
    if img_size is not None:
        check_img_size(network, img_size)
        preprocess = dataclasses.replace(preprocess, size=img_size)
    images = _pick(data, num_images)
    where = model.device if isinstance(model, ClassPredictor) else resolve_device(device)
    transform = preprocess.transform()
    loaded = [transform(open_image(image)) for image in console.progress(images, desc="images", unit="img")]
    batches = [batch.to(where) for batch in torch.stack(loaded).split(batch_size)]
    network = copy.deepcopy(network).float().eval().to(where)
    operations, runs = run_all(network, batches)
    if not operations:
        raise ValueError(f"{name}: computes nothing that could be examined")
    num_params = sum(p.numel() for p in network.parameters())
    source = str(data) if isinstance(data, (str, Path)) else "memory"
    size = (preprocess.size[0], preprocess.size[1])
    return Report(name, is_random, num_params, source, len(images), size, str(where), operations, runs)


def _resolve(model: Model) -> tuple[nn.Module, Preprocess, str, bool]:
    """The network, its preprocessing, its name, and whether its weights are random."""
    if isinstance(model, ClassPredictor):
        return model.model, model.preprocess, model.info.model, False
    if isinstance(model, nn.Module):
        network: Any = getattr(model, "_orig_mod", model)  # unwraps torch.compile's module
        return network, _default_preprocess(network), type(network).__name__, False
    if not isinstance(model, (str, Path)):
        raise ValueError(f"a model given as {type(model).__name__}; expected a predictor, a network, a path or a name")
    name = str(model)
    if format_of(model):
        message = "an exported model has no layers to look into; give the run that it was exported from"
        raise ValueError(f"{name}: {message}")
    try:
        network, info = load_model(model, task="classify")
        return network, Preprocess(**info.preprocess), name, False
    except FileNotFoundError:
        if Path(name).exists() or not timm.is_model(name):
            raise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(name)
    return network, _default_preprocess(network), name, True


def _default_preprocess(network: Any) -> Preprocess:
    cfg = resolve_model_data_config(network)
    size = getattr(network, "img_size", cfg["input_size"][1:])
    return Preprocess(tuple(size), cfg["crop_pct"], cfg["interpolation"], cfg["mean"], cfg["std"])


def _pick(data: str | Path | Sequence[ImageSource], num_images: int) -> list[ImageSource]:
    """``num_images`` of the images at equal distances, or all if there are not more."""
    found = all_images(str(data)) if isinstance(data, (str, Path)) else data
    if not found:
        raise ValueError("no images given")
    count = min(num_images, len(found))
    return [found[i * len(found) // count] for i in range(count)]
