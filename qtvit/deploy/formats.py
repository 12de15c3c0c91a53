"""Writing a network as a graph that other runtimes read: ONNX, OpenVINO, ``torch.export``.

The types of a graph say what is computed in which precision, and every runtime is told to keep to them. So a network in
half precision keeps the norms, token sums and divisions of its attention in fp32 wherever it runs.
"""

import ast
import copy
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .artifact import INPUT, METADATA_KEY, OUTPUT, Artifact

OPSET = 20
"""Of ONNX: the first with GELU as one operator; ONNX Runtime has read it since 1.17."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a network is cast to for a precision."""

FULL_PRECISION = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"}
"""OpenVINO's note on an operation that is not to run in half precision."""

REQUIRED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
"""Packages that writing and running a format takes, all in the extra ``deploy``."""


class Graph(nn.Module):
    """The network with fp32 in and out, whatever its own precision: (B, 3, H, W) pixels to its logits."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(dtype).eval()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype)).float()


def write(network: nn.Module, artifact: Artifact, path: Path) -> None:
    """Write ``network``, ready for inference and in fp32, as ``artifact`` says; all but int8.

    Raises:
        ValueError: the network cannot be written like that.
    """
    graph = Graph(network, DTYPES[artifact.precision])
    if artifact.format == "torch":
        torch.export.save(_trace(graph, artifact), path, extra_files={METADATA_KEY: artifact.to_json()})
    elif artifact.format == "onnx":
        write_onnx(graph, artifact, path)
    else:
        save_openvino(openvino_model(graph, artifact), artifact, path)


def write_onnx(graph: Graph, artifact: Artifact, path: Path) -> None:
    """Write one .onnx file, weights and description in it."""
    program: Any = onnx_program(_trace(graph, artifact), [OUTPUT], artifact)
    program.model.metadata_props[METADATA_KEY] = artifact.to_json()
    program.save(path, external_data=False)


def openvino_model(graph: Graph, artifact: Artifact) -> Any:
    """The ``openvino.Model`` of a network.

    It comes by way of ONNX: read from ``torch.export`` itself, dynamic shapes leave copies of whole tensors in the
    graph. The reader of ONNX does not know bf16, so that is made of fp16.
    """
    import openvino

    is_bf16 = graph.dtype == torch.bfloat16
    graph = Graph(graph.network.float(), torch.float16) if is_bf16 else graph
    with tempfile.TemporaryDirectory(prefix="qtvit-") as folder:
        file = Path(folder, "model.onnx")
        onnx_program(_trace(graph, artifact), [OUTPUT], artifact).save(file, external_data=False)
        with quiet_tools():
            model = openvino.convert_model(file)
    if is_bf16:
        _half_to_bfloat16(model)
    return model


def save_openvino(model: Any, artifact: Artifact, path: Path) -> None:
    """Write an ``openvino.Model`` with its description: ``path`` and the .bin beside it.

    A file in half precision is often opened without saying that its types are meant, and all of it would then run in
    what is fastest there. So what is fp32 in it is marked as such, which OpenVINO heeds since 2026.
    """
    import openvino

    model.set_rt_info(artifact.to_json(), [METADATA_KEY, "description"])
    openvino.save_model(model, path, compress_to_fp16=False)
    if artifact.precision in ("bf16", "fp16"):
        written = openvino.Core().read_model(path).get_ops()
        computed = (op for op in written if op.get_type_name() not in ("Constant", "Parameter", "Result"))
        full = {op.get_friendly_name() for op in computed if op.get_output_element_type(0) == openvino.Type.f32}
        tree = ElementTree.parse(path)
        for layer in tree.iter("layer"):
            if layer.get("name") in full:
                notes = layer.find("rt_info")
                if notes is None:
                    notes = ElementTree.Element("rt_info")
                    layer.insert(0 if layer.find("data") is None else 1, notes)
                ElementTree.SubElement(notes, "attribute", FULL_PRECISION)
        tree.write(path, encoding="utf-8", xml_declaration=True)


def _trace(graph: Graph, artifact: Artifact) -> ExportedProgram:
    """The traced graph of pixels to logits."""
    example = torch.zeros(2 if "batch" in artifact.dynamic else 1, 3, *artifact.img_size)
    dynamic = {0} if "batch" in artifact.dynamic else set()
    return trace(graph, example, dynamic | ({2, 3} if "hw" in artifact.dynamic else set()), artifact)


def trace(graph: nn.Module, example: Tensor, dynamic: Set[int], artifact: Artifact) -> ExportedProgram:
    """The traced graph, without the places in this machine's files that torch notes at every step.

    Args:
        graph: has one argument, `INPUT`.
        example: of it.
        dynamic: its dimensions that are left open.
        artifact: for the error.
    """
    dynamic_shapes = {INPUT: dict.fromkeys(dynamic, Dim.DYNAMIC) or None}
    with quiet_tools(), torch.no_grad():
        try:
            program = torch.export.export(graph, (example,), dynamic_shapes=dynamic_shapes)
        except Exception as error:  # torch.export's have no common base class
            raise _cannot_export(artifact, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def onnx_program(program: ExportedProgram, outputs: Sequence[str], artifact: Artifact) -> Any:
    """The ``torch.onnx.ONNXProgram``, with nodes named after the layers they are of."""
    with quiet_tools():
        try:
            onnx: Any = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=outputs, verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _cannot_export(artifact, error) from error
    _name_nodes(onnx.model.graph)
    _name_dims(onnx.model.graph)
    return onnx


def _name_nodes(graph: Any) -> None:
    """Put the layer in front of each node's name, as in stages.3.1.attn/node_matmul_2, without the exporter's notes."""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        layer = scopes[-2].removeprefix("network").removeprefix(".") if len(scopes) > 1 else ""
        node.name = f"{layer}/{node.name}" if layer else node.name
        node.metadata_props.clear()


def _name_dims(graph: Any) -> None:
    """Call the input's dynamic dimensions batch, height and width, also in the sizes that follow from them."""
    import onnx_ir

    names = {}
    shape = graph.inputs[0].shape
    for dim, name in zip(shape, ("batch", "channels", "height", "width")[-len(shape) :], strict=True):
        if isinstance(dim, onnx_ir.SymbolicDim):
            names[str(dim.value)] = name
    if not names:
        return
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = symbols.sub(lambda match: names[match[0]], str(dim.value))


def _half_to_bfloat16(model: Any) -> None:
    """Turn what is fp16 in an ``openvino.Model`` into bf16."""
    import openvino

    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() == openvino.Type.f16:
            constant = openvino.opset13.constant(op.data.astype("float32"), openvino.Type.bf16)
            constant.set_friendly_name(op.get_friendly_name())
            for user in op.output(0).get_target_inputs():
                user.replace_source_output(constant.output(0))
        elif op.get_type_name() == "Convert" and op.get_attributes()["destination_type"] == "f16":
            op.set_attribute("destination_type", "bf16")
    model.validate_nodes_and_infer_types()


def _cannot_export(artifact: Artifact, error: Exception) -> ValueError:
    size = "x".join(map(str, artifact.img_size))
    dynamic = f" and dynamic {', '.join(artifact.dynamic)}" if artifact.dynamic else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{artifact.info.model} cannot be exported with images of {size}{dynamic}: {reason}")


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Without what exporters say of their own code, and without OpenVINO's tools telling Intel that they are used.

    They do so by default, but not under continuous integration.
    """
    disabled, ci = logging.root.manager.disable, os.environ.get("CI")
    logging.disable(logging.WARNING)
    os.environ["CI"] = "true"
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if ci is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = ci
