"""Writing a network as a graph that other runtimes read: ONNX, OpenVINO or ``torch.export``.

The graph's types say what is computed in which precision, and every runtime is told to keep to them. So a network in
half precision computes the norms, token sums and divisions of its attention in fp32 wherever it runs.
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
"""ONNX opset: the first with GELU as one operator; ONNX Runtime reads it since 1.17."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that a network is cast to for a precision."""
FULL_PRECISION = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"}
"""OpenVINO's attribute of an operation that must not run in half precision."""
REQUIRED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
"""Packages needed to write and run a format, all in the extra ``deploy``."""


class Graph(nn.Module):
    """The network cast to ``dtype``, with fp32 input and output: (B, 3, H, W) pixels to its logits."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(dtype).eval()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype)).float()


def write(network: nn.Module, artifact: Artifact, path: Path) -> None:
    """Write ``network``, ready for inference and in fp32, in the format and precision of ``artifact``, but not in int8.

    Raises:
        ValueError: the network cannot be exported like that.
    """
    graph = Graph(network, DTYPES[artifact.precision])
    if artifact.format == "torch":
        torch.export.save(_trace(graph, artifact), path, extra_files={METADATA_KEY: artifact.to_json()})
    elif artifact.format == "onnx":
        program = onnx_program(_trace(graph, artifact), [OUTPUT], artifact)
        program.model.metadata_props[METADATA_KEY] = artifact.to_json()
        program.save(path, external_data=False)
    else:
        save_openvino(_openvino_model(graph, artifact), artifact, path)


def _openvino_model(graph: Graph, artifact: Artifact) -> Any:
    """The ``openvino.Model`` of a network.

    It is read from ONNX: OpenVINO's reader of ``torch.export`` leaves copies of whole tensors in graphs with dynamic
    shapes. The reader of ONNX does not know bf16, so a bf16 graph is read in fp16 and then changed.
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
    """Write an ``openvino.Model`` and its description: ``path``, and the .bin beside it.

    Files in half precision are often opened without OpenVINO's accuracy mode, and everything would then run in the
    fastest type. So the operations that are in fp32 are marked as such, which OpenVINO respects since 2026.
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
    """Trace the graph with the artifact's image size and dynamic axes."""
    # The example of a dynamic batch has 2 images, as torch.export takes a dimension of 1 for a constant.
    example = torch.zeros(2 if "batch" in artifact.dynamic else 1, 3, *artifact.img_size)
    dynamic = {axis for name, axis in (("batch", 0), ("hw", 2), ("hw", 3)) if name in artifact.dynamic}
    return trace(graph, example, dynamic, artifact)


def trace(graph: nn.Module, example: Tensor, dynamic: Set[int], artifact: Artifact) -> ExportedProgram:
    """Trace ``graph``, whose only argument is named `INPUT`, with ``torch.export``.

    ``example`` is a value of that argument, and ``dynamic`` are its dimensions that may vary. Stack traces are removed,
    because they show paths on this machine.
    """
    dynamic_shapes = {INPUT: dict.fromkeys(dynamic, Dim.DYNAMIC) or None}
    with quiet_tools(), torch.no_grad():
        try:
            program = torch.export.export(graph, (example,), dynamic_shapes=dynamic_shapes)
        except Exception as error:  # torch.export's exceptions have no common base class
            raise _cannot_export(artifact, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def onnx_program(program: ExportedProgram, outputs: Sequence[str], artifact: Artifact) -> Any:
    """Convert to a ``torch.onnx.ONNXProgram``, with nodes named after the layers that they belong to."""
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
    """Prefix each node's name with its layer, as in stages.3.1.attn/node_matmul_2; remove the exporter's metadata."""
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        layer = scopes[-2].removeprefix("network").removeprefix(".") if len(scopes) > 1 else ""
        node.name = f"{layer}/{node.name}" if layer else node.name
        node.metadata_props.clear()


def _name_dims(graph: Any) -> None:
    """Rename the input's dynamic dimensions to batch, height and width, also in the expressions of other shapes."""
    import onnx_ir

    names = {}
    shape = graph.inputs[0].shape
    for dim, name in zip(shape, ("batch", "channels", "height", "width")[-len(shape) :], strict=True):
        if isinstance(dim, onnx_ir.SymbolicDim):
            names[str(dim.value)] = name
    if not names:
        return
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = symbols.sub(lambda match: names[match[0]], str(dim.value))


def _half_to_bfloat16(model: Any) -> None:
    """Replace fp16 by bf16 in the constants and casts of an ``openvino.Model``."""
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
    """Silence the exporters' logs, warnings and prints, and the telemetry that OpenVINO's tools send to Intel.

    They send none where the variable ``CI`` says that they run under continuous integration.
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
        del os.environ["CI"]
        if ci is not None:
            os.environ["CI"] = ci
