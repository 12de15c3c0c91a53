"""int8: convolutions in 8 bits, attention not."""

import re
from pathlib import Path

import onnx
import openvino
import pytest

import qtvit
from qtvit.deploy import parity as check_module
from qtvit.deploy.export import export_model
from qtvit.tasks.classify.pack import pack_folder
from qtvit_cli import main

pytestmark = pytest.mark.slow


def test_onnx(tiny_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(tiny_run), "--precision", "int8", "--calibration", str(photos)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "quantizing with 12 images" in out
    assert "checked next to the model on 12 calibration images:" in out
    for precision in ("int8", "fp32"):
        assert re.search(rf"^{precision} +\d\.\d MB +[\d.]+ ms  [\d.]+$", out, re.MULTILINE)
    file = tiny_run / "model-int8.onnx"
    assert [path for path in tiny_run.iterdir() if path.name.startswith(".")] == []
    graph = onnx.load(file).graph
    producers = {output: node for node in graph.node for output in node.output}
    eight_bits = {"stages.1.1.attn.qkv": 0, "stages.0.1.main.depth_conv": 0}
    for node in graph.node:
        dequantized = [
            name for name in node.input if name in producers and producers[name].op_type == "DequantizeLinear"
        ]
        if node.op_type == "Conv":
            assert len(dequantized) >= 2, node.name
            for layer in eight_bits:
                eight_bits[layer] += node.name.startswith(layer)
        elif node.op_type == "MatMul":
            assert node.name.startswith("stages.1.1.attn/")
            assert not dequantized
    assert min(eight_bits.values()) > 0
    exported, run = qtvit.load(file), qtvit.load(tiny_run, device="cpu")
    assert exported.classes == run.classes
    assert exported.predict(next(photos.rglob("*.png"))).labels
    with_weights = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    assert list(with_weights.values()).count("INT8") >= 8


def test_openvino_with_labelled_images(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack_folder(photos, packed)
    done = export_model(
        tiny_run, format="openvino", precision="int8", calibration=packed, data=str(packed), max_drop=20
    )
    assert done.report.accuracy is not None
    assert done.report.accuracy[0] - done.report.accuracy[1] <= 20
    assert {path.name for path in done.files} == {"model-int8.xml", "model-int8.bin"}
    assert done.report.gain is not None
    sizes = done.report.gain.num_bytes
    assert list(done.report.gain.seconds) == list(sizes) == ["int8", "fp32", "bf16"]
    assert sizes["int8"] == sum(path.stat().st_size for path in done.files)
    assert sizes["bf16"] < sizes["fp32"]
    model = openvino.Core().read_model(done.files[0])
    quantized = {
        user.get_node().get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() == "FakeQuantize"
        for user in op.output(0).get_target_inputs()
    }
    assert any(name.startswith("stages.1.1.attn.qkv") for name in quantized)
    products = {
        op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "MatMul" and "attn/" in str(op)
    }
    assert len(products) == 3
    assert not products & quantized
    assert qtvit.load(done.files[0]).predict(next(photos.rglob("*.png"))).labels


def test_too_large_a_loss(
    tiny_run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(check_module.MIN_AGREEMENT, "int8", 1.1)
    before = sorted(tiny_run.iterdir())
    images = str(photos)
    assert main(["export", str(tiny_run), "--precision", "int8", "--calibration", images, "--data", images]) == 2
    error = capsys.readouterr().err
    assert (
        "not exported: the int8 file for ONNX Runtime failed its check: it gives the class of the network for" in error
    )
    assert error.endswith("; --format openvino keeps layers in fp32 until it loses no more than --max-drop\n")
    assert sorted(tiny_run.iterdir()) == before
