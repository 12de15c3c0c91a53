"""A network's view of an image, and the exact rows of its attention.

Points are (x, y) in pixels, and (0, 0) is the centre of the upper left pixel. A network's strides are those of 3×3
convolutions padded by 1, of which output i is centred on input 2 i: so at a stride of s, token i is centred on pixel
s i, and covers the pixels from s (i - 1/2) to s (i + 1/2).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
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
from qtvit.device import resolve_device
from qtvit.errors import unknown_name
from qtvit.files import replacing
from qtvit.layers import LinearAttention, MultiScaleAttention
from qtvit.models.build import check_img_size
from qtvit.models.qtvit import QTViT
from qtvit.ops import attention_weights
from qtvit.tasks.classify.predict import ClassPredictor, Prediction

from .entropy import Focus, layer_focus
from .points import Point, check_points

Model = ClassPredictor | nn.Module | str | Path
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
        tokens: row and column in H and W of the token that is centred nearest to each point.
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
    """A network's view of one image; `look` makes it. The image is shown once, when the first question is asked.

    Attributes:
        network: the network.
        image: as the network sees it.
        original_size: (width, height) of the image before it was resized.
        pixels: ``image`` normalised, (1, 3, H, W).
        classes: readable names, if they are known.
    """

    network: QTViT
    image: Image.Image
    original_size: tuple[int, int]
    pixels: Tensor
    classes: list[str]

    def num_heads(self, layer: int | str = -1) -> int:
        """Of both scales together; errors as for `attention`."""
        module = self._layers[self._layer_name(layer)]
        return module.num_scales * module.qkv.in_channels // module.head_dim

    @torch.no_grad()
    def attention(self, at: Point | Sequence[Point], layer: int | str = -1) -> Attention:
        """See `attention`."""
        points = check_points(at, self.original_size)
        name = self._layer_name(layer)
        module, x = self._layers[name], self.inputs[name]
        stride = self.network.feature_info[int(name.split(".")[1])]["reduction"]
        height, width = x.shape[-2:]
        scale_x, scale_y = (now / before for now, before in zip(self.image.size, self.original_size, strict=True))
        marks = tuple(((px + 0.5) * scale_x - 0.5, (py + 0.5) * scale_y - 0.5) for px, py in points)
        nearest = ((math.floor(my / stride + 0.5), math.floor(mx / stride + 0.5)) for mx, my in marks)
        tokens = tuple((min(row, height - 1), min(column, width - 1)) for row, column in nearest)
        q, k, _ = (part.mT for part in module.tokens(x))
        queries = q[:, :, [row * width + column for row, column in tokens]]
        rows = attention_weights(queries, k, module.kernel, dict(module.scalars.items()), module.attn_eps)
        weights = rows[0].transpose(0, 1).unflatten(-1, (height, width)).float().cpu()
        return Attention(
            weights, name, module.kernel, stride, tokens, marks, tuple(points), self.image, self.prediction
        )

    def focus(self) -> list[Focus]:
        """See `focus`."""
        result = []
        for name in console.progress(list(self.inputs), desc="Measuring", unit="layer"):
            module, x = self._layers[name], self.inputs[name]
            height, width = x.shape[-2:]
            result.append(Focus(name, module.kernel, (height, width), *layer_focus(module, x)))
        return result

    @property
    def inputs(self) -> dict[str, Tensor]:
        """By name of the attention layer, in the order of the network, what comes in: (1, C, H, W)."""
        return self._shown[0]

    @property
    def prediction(self) -> Prediction | None:
        """See `Attention`."""
        return self._shown[1]

    @cached_property
    @torch.no_grad()
    def _shown(self) -> tuple[dict[str, Tensor], Prediction | None]:
        inputs: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
            for name, layer in self._layers.items()
        ]
        try:
            with _evaluating(self.network):
                logits = self.network(self.pixels)
        finally:
            for handle in handles:
                handle.remove()
        if not self.classes or logits.shape != (1, len(self.classes)):
            return inputs, None
        top = logits[0].float().softmax(-1).topk(min(5, len(self.classes)))
        labels = tuple(self.classes[i] for i in top.indices.tolist())
        return inputs, Prediction(labels, tuple(top.values.tolist()))

    @property
    def _layers(self) -> dict[str, MultiScaleAttention]:
        modules = self.network.named_modules()
        return {name: module for name, module in modules if isinstance(module, MultiScaleAttention)}

    def _layer_name(self, layer: int | str) -> str:
        names = list(self._layers)
        if isinstance(layer, Integral) and not isinstance(layer, bool):
            if not -len(names) <= layer < len(names):
                known = ", ".join(names)
                raise ValueError(f"there is no attention layer {layer}; they are 0 to {len(names) - 1}: {known}")
            return names[layer]
        if not isinstance(layer, str):
            raise ValueError(f"layer is a number, or a name such as {names[-1]}, got {layer!r:.80}")
        if layer in names:
            return layer
        if layer and layer in dict(self.network.named_modules()):
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
        at: (x, y) in pixels of the original image (x to the right, y down, (0, 0) the upper left pixel), or a list or
            an array of such points. The query of a point is the token that is centred nearest to it: at a stride of s,
            token i is centred on pixel s i of the image that the network sees.
        layer: index among the attention layers (0 the first, -1 the last) or module name, such as "stages.2.1.attn".
        img_size: another shorter side, or the exact (H, W) to resize to.

    Raises:
        FileNotFoundError: there is no such model or image.
        ValueError: the model has no attention layers of ours, or has them in a network of another kind; ``at`` is no
            point, or outside the image; there is no such layer, or it has no attention; the image cannot be read, or
            ``img_size`` is too small.
    """
    return look(model, image, img_size).attention(at, layer)


def focus(model: Model, image: ImageSource, img_size: int | tuple[int, int] | None = None) -> list[Focus]:
    """How focused each attention layer is on ``image``; arguments and errors as for `attention`.

    All N queries are measured, which takes O(N²) time, but little memory.
    """
    return look(model, image, img_size).focus()


def look(model: Model, image: ImageSource, img_size: int | tuple[int, int] | None = None, device: str = "auto") -> View:
    """A view of ``image`` for any number of questions; arguments and errors as for `attention`.

    ``device`` is where a model that is given by name or path runs; any other stays where it is.
    """
    network, preprocess, classes = _resolve(model, device)
    picture = open_image(image)
    height, width = _shown_size(picture.size, min(preprocess.size) if img_size is None else img_size)
    check_img_size(network, (height, width), "img_size")
    shown = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = tvf.to_dtype(tvf.to_image(shown), torch.float32, scale=True)
    pixels = tvf.normalize(pixels, list(preprocess.mean), list(preprocess.std))
    return View(network, shown, picture.size, pixels[None].to(next(network.parameters())), classes)


def _resolve(model: Model, device: str) -> tuple[QTViT, Preprocess, list[str]]:
    """The network, its preprocessing and the readable names of its classes, as far as they are known."""
    network: Any
    name = ""
    if isinstance(model, ClassPredictor):
        network, preprocess, classes = model.model, model.preprocess, model.classes
    elif isinstance(model, nn.Module):
        network = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        cfg = resolve_model_data_config(network)
        size = getattr(network, "img_size", cfg["input_size"][1:])
        preprocess, classes = Preprocess(size, mean=cfg["mean"], std=cfg["std"]), []
    elif isinstance(model, (str, Path)):
        network, info = load_model(model, task="classify")
        network.to(resolve_device(device))
        name, preprocess, classes = f"{model}: ", Preprocess(**info.preprocess), class_names(info.classes)
    else:
        raise ValueError(f"a model given as {type(model).__name__}; expected a predictor, a network, a path or a name")
    kind, modules = type(network).__name__, list(network.modules())
    if not any(isinstance(module, (MultiScaleAttention, LinearAttention)) for module in modules):
        raise ValueError(f"{name}{kind} has no attention layers of qtvit, so there are no maps of it")
    if not isinstance(network, QTViT):
        raise ValueError(f"{name}{kind} has attention of qtvit, but maps are made only of qtvit's own networks (QTViT)")
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
    if isinstance(img_size, (tuple, list)) and len(img_size) == 2 and all(type(side) is int for side in img_size):
        return img_size[0], img_size[1]
    if type(img_size) is not int:
        raise ValueError(f"img_size is a side, or (height, width), in whole pixels, got {img_size!r:.80}")
    scale = img_size / min(size)
    width, height = (max(round(side * scale), img_size) for side in size)
    return height, width
