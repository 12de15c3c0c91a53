import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qtvit.bench import latency
from qtvit.bench.candidates import Candidate
from qtvit.bench.latency import bench_latency
from qtvit_cli import main

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]


def test_ours_next_to_the_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench"
    argv = "bench latency qtvit_nano plain:qtvit_nano released:qtvit_nano --peer efficientvit_m0 --img-size 32,32x64"
    argv += f" --batch-size 1,2 --runtime eager --precision fp32,bf16 --rounds 2 --threads 1 --output {out}"
    assert main(argv.split()) == 0
    result = json.loads(out.with_name("bench.json").read_text())
    rows = result["rows"]
    assert len(rows) == 4 * 2 * 2 * 2
    assert not result["failed"]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["median_seconds"])
        assert row["gflops"] == pytest.approx(2e-9 * row["num_macs"] * row["images_per_second"])
        peak = result["matmul_peaks"][row["precision"]]["gflops"]
        assert row["peak_fraction"] == pytest.approx(row["gflops"] / peak)
        same = ("runtime", "precision", "img_size", "batch_size")
        (peer,) = (r for r in rows if r["model"] == "efficientvit_m0" and all(r[name] == row[name] for name in same))
        by_round = [a / b for a, b in zip(row["seconds"], peer["seconds"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(sum(by_round) / 2)
        assert row["output_error"] < (1e-4 if row["precision"] == "fp32" else 0.3)
    forms = {row["model"]: row["form"] for row in rows}
    assert forms["qtvit_nano"] == "inference"
    assert forms["plain:qtvit_nano"] == "as trained"
    assert forms["released:qtvit_nano"] == "as released"
    assert result["environment"]["threads"] == 1
    assert result["command"] == f"qtvit {argv}"
    with Image.open(out.with_name("bench.png")) as picture:
        assert picture.width > 1000
    printed = capsys.readouterr().out
    assert "32x64" in printed
    assert "matrix products in bf16" in printed
    assert "written: " in printed


def test_other_runtimes_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    out = tmp_path / "bench.json"
    argv = f"bench latency qtvit_nano --peer qtvit_nano --img-size 32 --runtime onnxruntime,openvino --json {out}"
    assert main([*argv.split(), "--rounds", "2", "--no-peak", "--memory"]) == 0
    result = json.loads(out.read_text())
    assert [row["runtime"] for row in result["rows"]] == ["onnxruntime", "openvino"]
    for row in result["rows"]:
        assert 1e6 < row["peak_bytes"] < 500e6
        assert row["peak_fraction"] is None
        assert row["output_error"] < 1e-3
    assert "peak MB" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_an_exported_file_runs_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qtvit.checkpoints import ModelInfo
    from qtvit.deploy.artifact import Artifact
    from qtvit.deploy.formats import write
    from qtvit.models import build_model

    info = ModelInfo("qtvit_nano", {"num_classes": 2}, ["a", "b"], {"size": [32, 32]})
    file = tmp_path / "model.onnx"
    write(build_model("qtvit_nano", num_classes=2).eval(), Artifact(info, "onnx", "fp32", ()), file)
    result = bench_latency(["qtvit_nano"], str(file), img_sizes=[(32, 32), (64, 64)], rounds=2)
    found = {row["model"]: row for row in result["rows"] if row["img_size"] == [32, 32]}
    assert (found[str(file)]["runtime"], found[str(file)]["precision"]) == ("onnxruntime", "fp32")
    assert found[str(file)]["form"] == "exported"
    assert found[str(file)]["num_macs"] < found["qtvit_nano"]["num_macs"]  # it has two classes
    assert found[str(file)]["peak_fraction"] > 0
    assert found["qtvit_nano"]["ratio"] is not None  # to the exported peer, whatever that runs in
    (left_out,) = result["failed"]
    assert left_out["model"] == str(file)
    assert "is for images of 32x32" in left_out["reason"]


def test_what_a_runtime_cannot_take_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = latency._open

    def fail(candidate: Candidate, *args: Any) -> Any:
        if candidate.name == "qtvit_nano":
            raise RuntimeError("no\nsuch operator")
        return opened(candidate, *args)

    monkeypatch.setattr(latency, "_open", fail)
    argv = "bench latency qtvit_nano --peer efficientvit_m0 --img-size 64 --rounds 2 --no-peak --threads 1"
    assert main(argv.split()) == 0
    printed = capsys.readouterr().out
    assert "left out: qtvit_nano eager fp32 64: no such operator" in printed
    argv = argv.replace("efficientvit_m0", "qtvit_nano")
    assert main(argv.split()) == 2
    assert capsys.readouterr().err == "qtvit: error: nothing could be measured: no such operator\n"


def test_wrong_outputs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = latency.RUNTIMES["eager"]

    def open_wrong(*args: Any) -> Any:
        run = runtime.open(*args)
        return lambda: 1.1 * run()

    monkeypatch.setitem(latency.RUNTIMES, "eager", type(runtime)(runtime.save, open_wrong))
    with pytest.raises(ValueError, match=r"outputs differ by 10\.0% from PyTorch's"):
        bench_latency(["qtvit_nano"], "qtvit_nano", img_sizes=[(32, 32)], rounds=2, peak=False)


def test_outputs_that_are_not_finite_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = latency.RUNTIMES["eager"]

    def open_infinite(*args: Any) -> Any:
        run = runtime.open(*args)
        return lambda: run() * torch.inf

    monkeypatch.setitem(latency.RUNTIMES, "eager", type(runtime)(runtime.save, open_infinite))
    argv = "bench latency qtvit_nano --peer qtvit_nano --img-size 32 --rounds 2 --no-peak --precision fp16"
    assert main(argv.split()) == 0
    assert "outputs are not finite!" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("qtvit_9", "unknown model 'qtvit_9'; did you mean qtvit_6"),
        ("--peer zzz", "unknown model 'zzz'; known: "),
        ("nowhere.onnx", "nowhere.onnx: no such file"),
        ("--runtime tensorrt", "unknown runtime 'tensorrt'"),
        ("--runtime ,", "--runtime needs a value"),
        ("--precision int8", "unknown precision 'int8'"),
        ("--precision bf16 --runtime onnxruntime", "onnxruntime has no bf16"),
        ("--img-size 224,0", "--img-size must be a side"),
        ("qtvit_0 --img-size 16", "below the network's minimum of 32 px"),
        ("--batch-size 0", "--batch-size must be whole numbers from 1"),
        ("--batch-size x", "--batch-size must be whole numbers from 1"),
        ("--rounds 1", "needs two rounds"),
        ("--device cuda:9", "no such device"),
    ],
)
def test_mistakes(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 500
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "extra"), [("onnxruntime", "deploy"), ("openvino", "deploy"), ("matplotlib", "train")]
)
def test_a_package_that_is_missing(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "qtvit.bench.plots", raising=False)
    monkeypatch.delattr("qtvit.bench.plots", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    runtime = ["--output", str(tmp_path / "x")] if package == "matplotlib" else ["--runtime", package]
    assert main(["bench", "latency", "qtvit_nano", *runtime]) == 2
    assert capsys.readouterr().err == f"qtvit: error: {package} is not installed; pip install 'qtvit[{extra}]'\n"
