"""A network's view of an image, and the exact rows of its attention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from qtvit import console
from qtvit.checkpoints import load_model
from qtvit.data import ImageSource, Preprocess, class_names, open_image
from qtvit.deploy import Prediction, Predictor
from qtvit.device import resolve_device
from qtvit.errors import unknown_name
from qtvit.files import replacing
from qtvit.layers import MultiScaleAttention
from qtvit.models.build import check_img_size
from qtvit.models.qtvit import QTViT
from qtvit.ops import attention_weights

from .entropy import Focus, layer_focus
from .points import Point, check_points

Model = Predictor | nn.Module | str | Path
"""A predictor, a network of ours, or what `qtvit.checkpoints.load_model` takes."""


@dataclass(frozen=True)
class Attention:
    """Rows of the attention weights of one layer: to what some points of an image attend.

    Attributes:
        weights: (points, heads, H, W) in fp32, on the CPU; those of a normalised kernel sum to 1 over H and W. The
            first half of the heads sees single tokens, the second half neighbourhoods of 5×5.
        layer: module name.
        kernel: its name.
        stride: pixels of ``image`` from one token to the next.
        tokens: row and column in H and W of the token that each point is in.
        marks: the points in pixels of ``image``.
        points: the points in pixels of the original image.
        image: as the network saw it.
        prediction: the most probable classes, if the network is a classifier whose classes are known.
    """

    weights: Tensor
    layer: str
    kernel: str
    stride: int
    tokens: tuple[tuple[int, int], ...]
    marks: tuple[Point, ...]
    points: tuple[Point, ...]
    image: Image.Image
    prediction: Prediction | None

    def save(self, path: Path) -> None:
        """Write ``weights`` to a .npy file; OSError if that fails."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, self.weights.numpy())


@dataclass(frozen=True)
class View:
    """A network's view of one image; `look` makes it.

    Attributes:
        network: the network.
        image: as the network saw it.
        original_size: (width, height) of the image before it was resized.
        inputs: by name of the attention layer, in the order of the network, what came in: (1, C, H, W).
        prediction: see `Attention`.
    """

    network: QTViT
    image: Image.Image
    original_size: tuple[int, int]
    inputs: dict[str, Tensor]
    prediction: Prediction | None

    @torch.no_grad()
    def attention(self, at: Point | Sequence[Point], layer: int | str = -1) -> Attention:
        """See `attention`."""
        points = check_points(at, self.original_size)
        name = self._layer_name(layer)
        module, x = self._module(name), self.inputs[name]
        stride = self.network.feature_info[int(name.split(".")[1])]["reduction"]
        height, width = x.shape[-2:]
        scale_x, scale_y = (now / before for now, before in zip(self.image.size, self.original_size, strict=True))
        marks = tuple((px * scale_x, py * scale_y) for px, py in points)
        tokens = tuple((min(int(my / stride), height - 1), min(int(mx / stride), width - 1)) for mx, my in marks)
        q, k, _ = (part.mT for part in module.tokens(x))
        queries = q[:, :, [row * width + column for row, column in tokens]]
        rows = attention_weights(queries, k, module.kernel, dict(module.scalars.items()))
        weights = rows[0].transpose(0, 1).unflatten(-1, (height, width)).float().cpu()
        return Attention(
            weights, name, module.kernel, stride, tokens, marks, tuple(points), self.image, self.prediction
        )

    def focus(self) -> list[Focus]:
        """See `focus`."""
        result = []
        for name in console.progress(list(self.inputs), desc="Measuring", unit="layer"):
            module, x = self._module(name), self.inputs[name]
            height, width = x.shape[-2:]
            result.append(Focus(name, module.kernel, (height, width), *layer_focus(module, x)))
        return result

    def _module(self, name: str) -> MultiScaleAttention:
        module: Any = self.network.get_submodule(name)
        return module

    def _layer_name(self, layer: int | str) -> str:
        names = list(self.inputs)
        if isinstance(layer, int):
            if not -len(names) <= layer < len(names):
                known = ", ".join(names)
                raise ValueError(f"there is no attention layer {layer}; they are 0 to {len(names) - 1}: {known}")
            return names[layer]
        if layer in names:
            return layer
        if layer in dict(self.network.named_modules()):
            raise ValueError(f"{layer!r} has no attention; the layers that have: {', '.join(names)}")
        raise unknown_name("attention layer", layer, names)


def attention(
    model: Model,
    image: ImageSource,
    at: Point | Sequence[Point],
    layer: int | str = -1,
    img_size: int | tuple[int, int] | None = None,
) -> Attention:
    """To what a point of ``image``, or each of a list of points, attends: exact rows of a layer's attention weights.

    The network sees the whole image, not cropped: resized (bicubic) so that its shorter side is that of the model's own
    input size. A row costs O(N) in the number of tokens N, but for the softmax kernel's.

    Args:
        model: a predictor (`qtvit.load`), a network of ours, which is left as it is, or a run folder, a model file or
            the name of a model that comes with the package.
        image: whatever `qtvit.data.open_image` takes.
        at: (x, y) in pixels of the original image (x to the right, y down, from its upper left corner), or a list.
        layer: index among the attention layers (0 the first, -1 the last) or module name, such as "stages.2.1.attn".
        img_size: another shorter side, or the exact (H, W) to resize to.

    Raises:
        FileNotFoundError: there is no such model or image.
        ValueError: the model has no attention layers of ours; a point is outside the image; there is no such layer, or
            it has no attention; the image cannot be read, or ``img_size`` is too small.
    """
    return look(model, image, img_size).attention(at, layer)


def focus(model: Model, image: ImageSource, img_size: int | tuple[int, int] | None = None) -> list[Focus]:
    """How focused each attention layer is on ``image``; arguments and errors as for `attention`.

    All N queries are measured, which takes O(N²) time, but little memory.
    """
    return look(model, image, img_size).focus()


@torch.no_grad()
def look(model: Model, image: ImageSource, img_size: int | tuple[int, int] | None = None, device: str = "auto") -> View:
    """Show ``image`` to the network once, for any number of questions; arguments and errors as for `attention`.

    ``device`` is where a model that is given by name or path runs; any other stays where it is.
    """
    network, preprocess, classes = _resolve(model, device)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, MultiScaleAttention)}
    picture = open_image(image)
    height, width = _shown_size(picture.size, min(preprocess.size) if img_size is None else img_size)
    check_img_size(network, (height, width), "img_size")
    shown = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = tvf.to_dtype(tvf.to_image(shown), torch.float32, scale=True)
    pixels = tvf.normalize(pixels, list(preprocess.mean), list(preprocess.std))
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    try:
        with _evaluating(network):
            logits = network(pixels[None].to(next(network.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    prediction = None
    if classes and logits.shape == (1, len(classes)):
        top = logits[0].float().softmax(-1).topk(min(5, len(classes)))
        prediction = Prediction(tuple(classes[i] for i in top.indices.tolist()), tuple(top.values.tolist()))
    return View(network, shown, picture.size, inputs, prediction)


def _resolve(model: Model, device: str) -> tuple[QTViT, Preprocess, list[str]]:
    """The network, its preprocessing and the readable names of its classes, as far as they are known."""
    network: Any
    name = ""
    if isinstance(model, Predictor):
        network, preprocess, classes = model.model, model.preprocess, model.classes
    elif isinstance(model, nn.Module):
        network = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        cfg = resolve_model_data_config(network)
        size = getattr(network, "img_size", cfg["input_size"][1:])
        preprocess, classes = Preprocess(size, mean=cfg["mean"], std=cfg["std"]), []
    elif isinstance(model, (str, Path)):
        network, info = load_model(model)
        network.to(resolve_device(device))
        name, preprocess, classes = f"{model}: ", Preprocess(**info.preprocess), class_names(info.classes)
    else:
        raise ValueError(f"a model given as {type(model).__name__}; expected a predictor, a network, a path or a name")
    if not isinstance(network, QTViT) or not any(isinstance(m, MultiScaleAttention) for m in network.modules()):
        raise ValueError(f"{name}{type(network).__name__} has no attention layers of qtvit, so there are no maps of it")
    if network.in_chans != 3:
        raise ValueError(f"{name}for images of {network.in_chans} channels, and images are read as RGB")
    return network, preprocess, classes


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """``network`` in evaluation mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _shown_size(size: tuple[int, int], img_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) to which an image of ``size`` (W, H) is resized."""
    if not isinstance(img_size, int):
        height, width = img_size
        return height, width
    scale = img_size / min(size)
    width, height = (max(round(side * scale), img_size) for side in size)
    return height, width
