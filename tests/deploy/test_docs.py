"""The examples of docs/deploy.md run, and without qtvit a file gives what it gives with it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qtvit

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((75, 50), 90).convert("RGB").save("cat.jpg")
    with_qtvit, without = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(with_qtvit, str(PAGE), "exec"), {})
    names: dict[str, object] = {}
    exec(compile(without, str(PAGE), "exec"), names)
    label = capsys.readouterr().out.splitlines()[-1]
    prediction = qtvit.load("model.onnx", threads=1).predict("cat.jpg")
    assert label == prediction.label
    logits = names["logits"]
    assert isinstance(logits, np.ndarray)
    expected = torch.tensor(logits[0]).softmax(-1).max()
    assert prediction.probability == pytest.approx(float(expected), abs=0.01)
