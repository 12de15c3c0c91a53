"""Runs that were trained before the tasks had rooms of their own: they load, evaluate, predict and export as then.

``then.json`` has what the commands said of them at that time. The network is a shrunken one, to keep the files small.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import qtvit
from qtvit import tasks
from qtvit.models import ARCHITECTURES, Architecture, Stage
from qtvit.training.options import parse_config
from qtvit_cli import main
from tests.tasks.detect.boxes import draw_boxes
from tests.tasks.segment.masks import draw_masks

pytestmark = pytest.mark.slow

RUNS = Path(__file__).with_name("old_runs")
THEN = json.loads((RUNS / "then.json").read_text())
DATA: dict[str, Callable[[Path], Any]] = {"digits": lambda path: None, "boxes": draw_boxes, "masks": draw_masks}
NEEDED = {"classify": "digits", "detect": "boxes", "segment": "masks"}


@pytest.fixture(autouse=True)
def _shrunken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attention = {"block": "attn", "expand": 2, "fewer_norm": True}
    stages = (Stage(8, 1, "ds", first="conv", stride=1), Stage(16, 1, **attention), Stage(24, 1, **attention))
    tiny = Architecture(stages, head_dim=8, head_widths=(16, 16), img_size=32, conv_init="kaiming")
    monkeypatch.setitem(ARCHITECTURES, "qtvit_nano", tiny)
    monkeypatch.chdir(tmp_path)
    for task in NEEDED:
        shutil.copytree(RUNS / task, tmp_path / task)


@pytest.mark.parametrize("task", NEEDED)
def test_scores(task: str) -> None:
    DATA[NEEDED[task]](Path(NEEDED[task]))
    command = f"eval {task} --data {NEEDED[task]} --json scores.json --num-workers 0 --device cpu"
    assert main(command.split()) == 0
    scores = json.loads(Path("scores.json").read_text())
    assert {name: scores[name] for name in THEN[task]["scores"]} == pytest.approx(THEN[task]["scores"], rel=1e-4)


@pytest.mark.parametrize("task", NEEDED)
def test_predictions(task: str) -> None:
    draw_boxes(Path("boxes"))
    draw_masks(Path("masks"))
    images = [row["image"] for row in THEN[task]["predictions"]]
    assert main(["predict", task, *images, "--json", "found.json", "--device", "cpu"]) == 0
    rows = json.loads(Path("found.json").read_text())
    for row in rows:
        for found in row.get("objects", []):
            del found["segmentation"]
    now, then = _flat(rows), _flat(THEN[task]["predictions"])
    assert now.keys() == then.keys()
    for place, value in then.items():
        assert now[place] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-3)), place


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every number and text in lists and dictionaries, by where it is."""
    if isinstance(value, (list, dict)):
        items = enumerate(value) if isinstance(value, list) else value.items()
        return {key: each for name, item in items for key, each in _flat(item, f"{path}/{name}").items()}
    return {path: value}


@pytest.mark.parametrize("task", NEEDED)
def test_export(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # so small a detector is undecided between proposals that are nearly the same, and rounding decides
    monkeypatch.setattr("qtvit.tasks.detect.export.MIN_MATCHED", 0)
    assert main(["export", task]) == 0
    predictor = qtvit.load(f"{task}/model.onnx")
    assert type(predictor) is tasks.get(task).load("predictor")
    assert predictor.info.classes == qtvit.load(task).info.classes


@pytest.mark.parametrize("task", NEEDED)
def test_the_configuration_is_a_recipe(task: str) -> None:
    config = parse_config(["--recipe", f"{task}/config.yaml"], tasks.get(task).load("config"))
    then = yaml.safe_load(Path(task, "config.yaml").read_text())
    assert (config.task, config.epochs, config.model) == (task, then["epochs"], "qtvit_nano")
