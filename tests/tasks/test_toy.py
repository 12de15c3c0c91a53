"""A task that is registered from outside is trained, evaluated, checked, exported and predicts as the others do."""

import json
from pathlib import Path

import pytest
from PIL import Image

import qtvit
from qtvit import tasks
from qtvit_cli import main
from tests.tasks import toy


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    tasks.register(toy.TASK)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for part, count in (("train", 48), ("val", 12)):
        (tmp_path / "grey" / part).mkdir(parents=True)
        for number in range(count):
            percent = 100 * number // count
            grey = Image.new("RGB", (16, 16), (255 * percent // 100,) * 3)
            grey.save(tmp_path / "grey" / part / f"{percent:02}-{number}.png")
    return tmp_path / "grey"


def test_the_commands_take_a_task_from_outside(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"train brightness --data {images} --output run --epochs 6 --batch-size 8 --lr 0.003 --power 1.5"
    assert main([*command.split(), "--num-workers", "0", "--num-threads", "1", "--bn-images", "16"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["error"] < 0.15
    assert {path.name for path in Path("run").iterdir()} >= {
        "best.safetensors",
        "config.yaml",
        "curves.png",
        "last.ckpt",
    }
    assert "power: 1.5" in Path("run/config.yaml").read_text()

    assert main(["eval", "run", "--data", str(images), "--worst", "2", "--output", "report", "--json", "all.json"]) == 0
    assert json.loads(Path("all.json").read_text())["error"] == pytest.approx(summary["error"], abs=1e-6)
    assert Path("report/error.txt").is_file()

    bright = str(max((images / "val").iterdir()))
    assert main(["predict", "run", bright, "--digits", "1", "--json", "found.json", "--save", "sheet.png"]) == 0
    [row] = json.loads(Path("found.json").read_text())
    assert row["brightness"] == round(row["brightness"], 1) == pytest.approx(0.9, abs=0.2)
    assert Path("sheet.png").is_file()
    assert isinstance(qtvit.load("run"), toy.BrightnessPredictor)

    assert main(["data", "check", str(images), "--task", "brightness", "--darkest", "10"]) == 1
    capsys.readouterr()
    assert main(["predict", "run", bright, "--top-k", "3"]) == 2
    assert "--top-k is not for a model that was trained to brightness" in capsys.readouterr().err
    assert main(["predict", "nano-cifar10", bright, "--digits", "3"]) == 2
    assert "--digits is not for a model that was trained to classify" in capsys.readouterr().err


def test_export_takes_a_task_from_outside(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"train brightness --data {images} --output {run} --epochs 1 --batch-size 8 --bn-images 0"
    assert main([*command.split(), "--num-workers", "0", "--num-threads", "1"]) == 0
    assert main(["export", str(run), "--format", "torch", "--calibration", str(images / "val")]) == 0
    assert isinstance(qtvit.load(run / "model.pt2"), toy.BrightnessPredictor)


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown task 'brihgtness'; did you mean brightness"):
        tasks.get("brihgtness")
