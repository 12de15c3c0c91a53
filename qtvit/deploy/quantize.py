"""Exporting in int8: convolutions and linear layers compute with 8-bit integers, the attention itself does not.

The products and divisions of the attention span ranges that eight bits cannot hold, and are few: in int8 they cost more
accuracy than they save time (docs/deploy.md has numbers).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from qtvit.console import say
from qtvit.data import ImageSource, open_image
from qtvit.device import kept_signal_stack
from qtvit.layers import LinearAttention, MultiScaleAttention

from .artifact import INPUT, METADATA_KEY, Artifact
from .formats import quiet_tools, save_openvino

Labelled = tuple[Sequence[ImageSource], Sequence[int]]
"""Images and their labels."""


def write_int8(
    plain: Path,
    path: Path,
    artifact: Artifact,
    network: nn.Module,
    images: Sequence[ImageSource],
    transform: Callable[[Any], Tensor],
    labelled: Labelled | None = None,
    max_drop: float = 1.0,
) -> None:
    """Quantize the fp32 file ``plain`` to an int8 file, ``path``.

    Args:
        network: the exported network; operations of its attention layers are excluded.
        images: calibration images, on which the ranges of activations are measured.
        transform: from a PIL image to the graph's input, (3, H, W).
        labelled: for OpenVINO: layers go back to fp32 until no more than ``max_drop`` is lost on these.
        max_drop: percentage points of top-1.
    """
    say(f"quantizing with {len(images)} images")

    def pixels(image: ImageSource) -> np.ndarray:
        return transform(open_image(image))[None].numpy()

    kinds = (LinearAttention, MultiScaleAttention)
    attentions = tuple(f"{name}/" for name, module in network.named_modules() if isinstance(module, kinds))
    if artifact.format == "openvino":
        save_openvino(_quantize_openvino(plain, attentions, pixels, images, labelled, max_drop), artifact, path)
    else:
        _quantize_onnx(plain, path, artifact, attentions, map(pixels, images))


def _quantize_openvino(
    plain: Path,
    attentions: tuple[str, ...],
    pixels: Callable[[ImageSource], np.ndarray],
    images: Sequence[ImageSource],
    labelled: Labelled | None,
    max_drop: float,
) -> Any:
    """The int8 ``openvino.Model``; ``attentions`` are the prefixes of the names of operations to exclude."""
    with quiet_tools(), kept_signal_stack():
        import nncf
        import openvino

        model = openvino.Core().read_model(plain)
        nncf.set_log_level(logging.ERROR)
        eight_bits = ("Constant", "Convolution", "GroupConvolution")
        kept = [
            op.get_friendly_name()
            for op in model.get_ops()
            if op.get_friendly_name().startswith(attentions) and op.get_type_name() not in eight_bits
        ]
        options: dict[str, Any] = {
            "subset_size": len(images),
            "model_type": nncf.ModelType.TRANSFORMER,  # also excludes what the attention of other networks needs
            "ignored_scope": nncf.IgnoredScope(names=kept, validate=False),
        }
        calibration = nncf.Dataset(images, pixels)
        if labelled is None:
            return nncf.quantize(model, calibration, **options)

        def top1(compiled: Any, items: Iterable[tuple[ImageSource, int]]) -> float:
            return 100 * float(np.mean([compiled(pixels(image))[0].argmax() == label for image, label in items]))

        validation = nncf.Dataset(list(zip(*labelled, strict=True)), lambda item: pixels(item[0]))
        return nncf.quantize_with_accuracy_control(
            model, calibration, validation, top1, max_drop=max_drop, drop_type=nncf.DropType.ABSOLUTE, **options
        )


def _quantize_onnx(
    plain: Path, path: Path, artifact: Artifact, attentions: tuple[str, ...], images: Iterator[np.ndarray]
) -> None:
    """Write an int8 .onnx file in QDQ format: a pair of quantize and dequantize nodes around each int8 operation."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {INPUT: image}

    model = onnx.load(plain)
    kept = [node.name for node in model.graph.node if node.name.startswith(attentions) and node.op_type != "Conv"]
    with quiet_tools():
        quantization.quantize_static(
            plain,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=kept,
        )
    quantized = onnx.load(path)
    onnx.helper.set_model_props(quantized, {METADATA_KEY: artifact.to_json()})
    onnx.save(quantized, path)
