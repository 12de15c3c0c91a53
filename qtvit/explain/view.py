"""A network's view of an image, with exact rows of its attention weights.

Points are (x, y) in pixels, and (0, 0) is the centre of the upper left pixel. The network downsamples with 3×3
convolutions padded by 1, whose output i is centred on input 2 i. So at a stride of s, token i is centred on pixel s i,
and covers the pixels from s (i - 1/2) to s (i + 1/2).
"""

import math
from collections.abc import Sequence
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
    """Rows of the attention weights of one layer: what some points of an image attend to.

    Attributes:
        weights: (points, heads, H, W) in fp32, on the CPU. For a normalised kernel they sum to 1 over H and W. The
            first half of the heads sees single tokens, the second half neighbourhoods of 5×5.
        layer: module name of the layer.
        kernel: name of its kernel.
        stride: pixels of ``image`` from one token to the next.
        tokens: (row, column) of the token whose centre is nearest to each point.
        marks: the points in pixels of ``image``.
        points: the points in pixels of the original image.
        image: the image as the network saw it.
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
    """A network's view of one image, made by `look`. The network runs once, when it is first needed.

    Attributes:
        network: the network.
        image: the image as the network sees it.
        original_size: (width, height) of the image before it was resized.
        pixels: ``image`` normalised, (1, 3, H, W).
        classes: readable names of the classes; empty if unknown.
    """

    network: QTViT
    image: Image.Image
    original_size: tuple[int, int]
    pixels: Tensor
    classes: list[str]

    def num_heads(self, layer: int | str = -1) -> int:
        """Number of heads of ``layer``, both scales together; errors as for `attention`."""
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
        scale_x, scale_y = (new / old for new, old in zip(self.image.size, self.original_size, strict=True))
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
        """The input (1, C, H, W) of each attention layer by its name, in the order of the network."""
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
        modes = {module: module.training for module in self.network.modules()}
        try:
            logits = self.network.eval()(self.pixels)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training
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
    """What a point of ``image``, or each of several points, attends to: exact rows of a layer's attention weights.

    The network sees the whole image without cropping, resized (bicubic) so that its shorter side is that of the model's
    own input size. A row takes O(N) time in the number of tokens N; the network's own pass takes O(N²) with softmax.

    Args:
        model: a predictor (`qtvit.load`), a network of ours, which is not changed, or a run folder, a model file or the
            name of a model that comes with the package.
        image: whatever `qtvit.data.open_image` takes.
        at: (x, y) in pixels of the original image, or a list or an array of such points; x points right, y down, and
            (0, 0) is the upper left pixel. The query of a point is the token whose centre is nearest to it.
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
    """Measure how focused each attention layer is on ``image``; arguments and errors as for `attention`.

    All N queries are measured, in O(N²) time but little memory.
    """
    return look(model, image, img_size).focus()


def look(model: Model, image: ImageSource, img_size: int | tuple[int, int] | None = None, device: str = "auto") -> View:
    """A `View` of ``image``, for several questions at the cost of one; arguments and errors as for `attention`.

    ``device`` is where a model given by name or path runs; any other model stays where it is.
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
    """The network, its preprocessing, and the readable names of its classes as far as they are known."""
    network: Any
    name = ""
    if isinstance(model, ClassPredictor):
        network, preprocess, classes = model.model, model.preprocess, model.classes
    elif isinstance(model, nn.Module):
        network = getattr(model, "_orig_mod", model)  # unwraps torch.compile's module
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


def _shown_size(size: tuple[int, int], img_size: int | tuple[int, int]) -> tuple[int, int]:
    """The (H, W) to resize an image of ``size`` (W, H) to."""
    if isinstance(img_size, (tuple, list)) and len(img_size) == 2 and all(type(side) is int for side in img_size):
        return img_size[0], img_size[1]
    if type(img_size) is not int:
        raise ValueError(f"img_size is a side, or (height, width), in whole pixels, got {img_size!r:.80}")
    scale = img_size / min(size)
    width, height = (max(round(side * scale), img_size) for side in size)
    return height, width
