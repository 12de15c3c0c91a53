"""The examples of docs/data.md run, and those on data of docs/detection.md."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtvit_cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "data.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(tmp_path / "photos" / split / name / f"{i}.jpg")
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    command = re.search(r"^qtvit (data check .*)$", text, re.MULTILINE)
    assert command is not None
    assert main(command[1].split()) == 0


def test_the_examples_on_detection_data_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "detection.md"
    data_section = page.read_text(encoding="utf-8").split("\n## Data\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", data_section, re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
    assert main(["data", "check", "scenes-python", "--task", "detect"]) == 0
