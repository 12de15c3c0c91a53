"""Exported files give what the model gives, in every format and precision, or there is no file."""

import dataclasses
import importlib.util
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import qtvit
from qtvit.checkpoints import BEST, load_model
from qtvit.deploy import export as export_module
from qtvit.deploy import fuse
from qtvit.deploy.artifact import FORMATS, PRECISIONS, Artifact
from qtvit.deploy.export import RANDOM, Export, default_path, export_model
from qtvit.deploy.formats import write
from qtvit.deploy.runtimes import open_exported
from qtvit.device import kept_signal_stack
from qtvit.layers import MultiScaleAttention
from qtvit.version import __version__
from qtvit_cli import main

from .conftest import CLASSES, save_tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Exporting = Callable[[str, str], Export]
FLOATS = [(name, precision) for name in FORMATS for precision in PRECISIONS[name] if precision != "int8"]


def pixels(batch_size: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(seed))


def difference(file: Path, network: nn.Module, images: Tensor) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    with torch.no_grad():
        expected = network(images)
    return float((open_exported(file)(images) - expected).abs().max() / expected.abs().max())


def read_all(file: Path) -> bytes:
    """The contents of a file, of all parts of an archive, and of the weights beside it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return b"".join(archive.read(name) for name in archive.namelist())
    beside = file.with_suffix(".bin")
    return file.read_bytes() + (beside.read_bytes() if beside.is_file() else b"")


@pytest.mark.parametrize(("format", "precision"), FLOATS)
def test_a_file_predicts_what_its_run_does(
    format: str, precision: str, exported: Exporting, tiny: None, photos: Path
) -> None:
    done = exported(format, precision)
    file, folder = done.files[0], done.files[0].parent
    assert file == default_path(folder, format, precision)
    assert {path.name for path in folder.iterdir()} == {BEST, *(path.name for path in done.files)}
    assert file.stat().st_mode == (folder / BEST).stat().st_mode
    run, loaded = qtvit.load(folder, device="cpu"), qtvit.load(file, threads=1)
    images = sorted(photos.rglob("*.png"))
    tolerance = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05}[precision]
    for one, other in zip(run.predict(images), loaded.predict(images, batch_size=5), strict=True):
        assert other.label == one.label
        assert other.probability == pytest.approx(one.probability, abs=tolerance)
    assert (loaded.classes, loaded.preprocess, loaded.device.type) == (run.classes, run.preprocess, "cpu")
    content = read_all(file)
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content
    loaded.close()


@pytest.mark.parametrize("format", FORMATS)
def test_any_size_and_batch_where_they_are_left_open(format: str, tiny_run: Path) -> None:
    done = export_model(tiny_run, format=format, dynamic=["hw", "batch"])
    assert done.artifact.dynamic == ("batch", "hw")
    assert {case.img_size for case in done.report.cases} == {(16, 20), (24, 30), (21, 40), (32, 26)}
    assert {case.batch_size for case in done.report.cases} == {1, 3, 8}
    network, _ = load_model(tiny_run)
    for shape in ((1, 16, 20), (4, 16, 20), (2, 33, 17), (1, 64, 48)):
        assert difference(done.files[0], network, pixels(*shape)) < 1e-5
    if format == "torch":
        with pytest.raises(ValueError, match=r"does not take pixels of shape \(1, 3, 2, 2\): Guard failed"):
            open_exported(done.files[0])(pixels(1, 2, 2))
    if format == "onnx":
        graph = onnx.load(done.files[0]).graph
        dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input]
        assert dims == [["batch", 3, "height", "width"]]
        assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_fixed_batch_and_size(format: str, tiny_run: Path) -> None:
    done = export_model(tiny_run, format=format, dynamic=[], img_size=(24, 16))
    network, _ = load_model(tiny_run)
    exported = open_exported(done.files[0])
    assert exported.artifact == done.artifact
    assert exported.artifact.img_size == (24, 16)
    assert qtvit.load(done.files[0]).preprocess.size == [24, 16]
    assert difference(done.files[0], network, pixels(5, 24, 16)) < 1e-5
    with pytest.raises(ValueError, match=r"is for images of 24x16, got 16x20; export it with --dynamic batch,hw"):
        exported(pixels(1, 16, 20))
    with pytest.raises(ValueError, match=r"expected pixels of shape \(B, 3, H, W\), got \(3, 24, 16\)"):
        exported(pixels(1, 24, 16)[0])


def test_the_description_in_the_file(exported: Exporting) -> None:
    done = exported("onnx", "fp16")
    entries = {entry.key: entry.value for entry in onnx.load(done.files[0]).metadata_props}
    stored = json.loads(entries["qtvit"])
    assert {name: stored[name] for name in ("format", "precision", "dynamic", "img_size", "version")} == {
        "format": "onnx",
        "precision": "fp16",
        "dynamic": ["batch"],
        "img_size": [16, 20],
        "version": __version__,
    }
    assert (stored["info"]["classes"], stored["info"]["preprocess"]["crop_pct"]) == (CLASSES, 0.9)
    assert Artifact.from_json(entries["qtvit"], done.files[0]) == dataclasses.replace(
        done.artifact, info=dataclasses.replace(done.artifact.info, version=__version__)
    )
    with pytest.raises(ValueError, match=r"m\.onnx: its description was written by another version of qtvit"):
        Artifact.from_json(json.dumps({**stored, "shape": 3}), Path("m.onnx"))


def test_attention_is_typed_fp32_in_half_precision(exported: Exporting) -> None:
    model = onnx.load(exported("onnx", "fp16").files[0])
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    seen = set()
    for node in model.graph.node:
        output = types.get(node.output[0])
        if node.op_type in ("MatMul", "ReduceSum", "ReduceL2", "Pow", "Sqrt", "Div") and ".attn/" in node.name:
            assert output == onnx.TensorProto.FLOAT, node.name
            seen.add(node.op_type)
        if node.op_type == "Conv":
            assert output == onnx.TensorProto.FLOAT16, node.name
    assert {"MatMul", "ReduceSum", "Div"} <= seen


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_openvino_runs_attention_in_fp32_even_when_it_is_told_otherwise(precision: str, exported: Exporting) -> None:
    file = exported("openvino", precision).files[0]
    core = openvino.Core()
    with kept_signal_stack():
        types = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    half = {"fp16": openvino.Type.f16, "bf16": openvino.Type.bf16}[precision]
    model = core.read_model(file)
    convolutions = [op for op in model.get_ops() if op.get_type_name().endswith("Convolution")]
    assert {op.get_output_element_type(0) for op in convolutions} == {half}
    configs: list[dict[str, str]] = [{"EXECUTION_MODE_HINT": "ACCURACY"}, {}]
    for hint in {"f16", "bf16"} & {t.lower().replace("fp", "f") for t in types}:
        configs.append({"INFERENCE_PRECISION_HINT": hint})
    for config in configs:
        executed = core.compile_model(model, "CPU", config).get_runtime_model().get_ops()
        notes = [
            {key: op.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")} for op in executed
        ]
        products = [note["runtimePrecision"] for note in notes if note["layerType"] == "MatMul"]
        assert len(products) == 3
        assert set(products) == {"f32"}


@torch.no_grad()
def strain(layer: MultiScaleAttention, inputs: tuple[Tensor]) -> None:
    """A hook that scales queries, keys and values to 1e4, so that token sums leave fp16's range."""
    parts = layer.tokens(inputs[0])
    scale = 1e4 / max(float(part.abs().max()) for part in parts)
    assert float(parts[2].sum(-1).abs().max()) * scale > torch.finfo(torch.float16).max
    layer.qkv.weight.mul_(scale)
    layer.pos_embed.mul_(scale)
    layer.proj.conv.weight.div_(scale)
    for name, power in (("running_mean", 1), ("running_var", 2), ("weight", 1), ("bias", 1)):
        getattr(layer.shortcut_norm, name).mul_(scale**power)


@pytest.mark.parametrize("format", ["openvino", "torch"])  # ONNX Runtime computes in fp32 on the CPU
def test_token_sums_beyond_fp16(format: str, tmp_path: Path) -> None:
    network: Any
    network, info = load_model("nano-cifar10")
    del network.stages[1][2], network.stages[2]  # one attention layer is enough
    network.head.in_conv = nn.Conv2d(48, 128, 1)
    images = pixels(8, 32, 32)
    with network.stages[1][1].attn.register_forward_pre_hook(strain), torch.no_grad():
        network(images)
    file = tmp_path / f"strained{FORMATS[format]}"
    write(fuse(network, (32, 32)), Artifact(info, format, "fp16"), file)
    assert difference(file, network, images) < 0.01


def test_queries_that_match_nothing(tiny: None, tmp_path: Path, randomize: Callable[..., nn.Module]) -> None:
    """ONNX's exporter takes an addition of 1e-15 for one of 0; without it, 0 would be divided by 0."""
    save_tiny(tmp_path / BEST, randomize, kernel="relu")
    network, _ = load_model(tmp_path)
    attention: Any = network.stages[1][1].attn
    with torch.no_grad():
        attention.qkv.weight[:8] = 0
    file = tmp_path / "model.onnx"
    write(network, Artifact(load_model(tmp_path)[1], "onnx"), file)
    assert difference(file, network, pixels(2, 16, 20)) < 1e-5


def test_a_file_that_fails_its_check_is_not_kept(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse = export_module.fuse

    def spoil(network: nn.Module, img_size: tuple[int, int] | None) -> nn.Module:
        fused: Any = fuse(network, img_size)
        fused.head.fc.bias.data[0] += 0.01
        return fused

    monkeypatch.setattr(export_module, "fuse", spoil)
    assert main(["export", str(tiny_run), "--format", "openvino"]) == 2
    assert re.fullmatch(
        r"qtvit: error: not exported: the fp32 file for OpenVINO failed its check: its logits differ by 0\.01 at "
        r"16x20 in batches of 8, with a largest logit of [\d.]+; allowed is 0\.0001 of that\n",
        capsys.readouterr().err,
    )
    assert [path.name for path in tiny_run.iterdir()] == [BEST]


def test_a_file_in_the_way(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny_run / "model.bin"
    weights.write_bytes(b"mine")
    assert main(["export", str(tiny_run), "--format", "openvino"]) == 2
    assert f"{weights} exists already; name another --out, or replace it with --force" in capsys.readouterr().err
    assert main(["export", str(tiny_run), "--format", "openvino", "--force", "--dynamic", "none"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"written: {tiny_run}/model.xml \(\d\.\d MB\), {weights} \(\d\.\d MB\)\n", out)
    assert "checked next to the model on 32 synthetic images (--data or --calibration gives real ones):" in out
    assert weights.stat().st_size > 4


def test_commands_take_the_file(
    tiny_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--img-size", "16", "24"]
    assert main(["export", "run", "--data", str(photos), "--out", "small.onnx", *size]) == 0
    out = capsys.readouterr().out
    assert f"checked next to the model on all images in {photos}:" in out
    top1 = re.search(r"top-1: (\d+\.\d\d) %, of the network (\d+\.\d\d) %", out)
    assert top1
    assert top1[1] == top1[2]
    evaluation = ["eval", "small.onnx", "--data", str(photos), "--num-workers", "0", "--json", "scores.json"]
    threads = torch.get_num_threads()
    try:
        assert main([*evaluation, "--threads", "3"]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert json.loads(Path("scores.json").read_text())["top1"] == pytest.approx(float(top1[1]), abs=0.01)
    folder = str(photos)
    assert main(["predict", "small.onnx", folder, "--threads", "1", "--batch-size", "5", "--json", "few.json"]) == 0
    rows = json.loads(Path("few.json").read_text())
    assert len(rows) == 12
    assert {prediction["label"] for row in rows for prediction in row["predictions"]} == set(CLASSES)


def test_a_name_alone_has_random_weights(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    assert main(["export", "qtvit_nano", "--format", "torch"]) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert "qtvit_nano: random weights, for timing; its predictions mean nothing" in capsys.readouterr().out
    exported = open_exported("qtvit_nano.pt2")
    assert exported.artifact.info.source == RANDOM
    logits = exported(pixels(4, 32, 32))
    assert 1e-3 < logits.std() < 20  # neither faded nor blown up


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("run", "run/model-bf16.xml"),
        ("run/best.safetensors", "run/model-bf16.xml"),
        ("run/weights.pth", "run/weights-bf16.xml"),
        ("nano-cifar10", "nano-cifar10-bf16.xml"),
        ("hf-hub:me/photos", "photos-bf16.xml"),
    ],
)
def test_where_it_is_written(source: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for name in ("best.safetensors", "weights.pth"):
        Path("run", name).touch()
    assert default_path(source, "openvino", "bf16") == Path(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --format tflite", "unknown format 'tflite'; known: onnx, openvino, torch"),
        ("run --precision fp8", "unknown precision 'fp8'; known: fp32, bf16, fp16, int8"),
        (
            "run --precision bf16",
            "--format onnx has no --precision bf16: ONNX Runtime has no bf16 convolutions for the CPU; --format "
            "openvino or torch has it",
        ),
        ("run --format torch --precision int8", "--format onnx or openvino has it"),
        ("run --dynamic width", "unknown dynamic axis 'width'; known: batch, hw"),
        ("run --precision int8", "--precision int8 needs --calibration, a folder of typical images"),
        ("run --precision int8 --calibration . --dynamic hw", "are measured at one image size and do not hold at oth"),
        ("run --calibration empty", "empty: no images in this folder"),
        ("run --calibration none", "none: no such folder"),
        ("run --max-drop -1", "--max-drop must be 0 or more points, got -1"),
        ("run --max-drop nan", "--max-drop must be 0 or more points, got nan"),
        ("run --out model.pt", "model.pt: a file of --format onnx has to end in .onnx"),
        ("run --format openvino --out folder.xml", "folder.bin: is a folder"),
        ("run --img-size 1", "--img-size 1x1 is below the network's minimum of 2 px, its largest stride"),
        ("run --img-size 1 2 3", "--img-size must be a side such as 224, or HEIGHTxWIDTH such as 160x256, got '1x2x3'"),
        ("nan", "nan: no such run folder or model file"),
        ("model.onnx", "model.onnx: an exported model has no layers to look into; give the run it was exported from"),
        ("vit_tiny_patch16_224 --dynamic hw", "vit_tiny_patch16_224 cannot be exported with images of 224x224 and dyn"),
    ],
)
def test_what_users_get_wrong(
    arguments: str, message: str, tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_run.parent)
    for folder in ("empty", "folder.bin"):
        Path(folder).mkdir()
    Path("model.onnx").touch()
    assert main(["export", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tiny_run.iterdir()] == [BEST]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.onnx", None, "m.onnx: no such file"),
        ("m.onnx", b"onnx", "m.onnx: ONNX Runtime cannot read it ("),
        ("m.xml", b"<html></html>", "m.xml: is not a model of OpenVINO"),
        ("m.xml", b"<?xml?><net name='x'>", "m.xml: its weights, m.bin, are not beside it"),
        ("m.pt2", b"zip", "m.pt2: PyTorch cannot read it (File is not a zip file)"),
    ],
)
def test_files_that_are_none(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    Image.new("RGB", (5, 5)).save(tmp_path / "x.png")
    assert main(["predict", str(file), str(tmp_path / "x.png")]) == 2
    assert message in capsys.readouterr().err


def test_files_of_others(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "m.onnx"), tmp_path / "m.xml")
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), tmp_path / "m.pt2")
    for suffix in FORMATS.values():
        with pytest.raises(ValueError, match=rf"m{suffix}: has no 'qtvit' entry in its metadata \(class names, prepr"):
            qtvit.load(tmp_path / f"m{suffix}")


def test_a_missing_package(tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    assert main(["export", str(tiny_run)]) == 2
    assert capsys.readouterr().err == "qtvit: error: onnxscript is not installed; pip install 'qtvit[deploy]'\n"
    assert main(["export", str(tiny_run), "--format", "torch"]) == 0
