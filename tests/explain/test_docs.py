"""The examples of docs/explain.md and of the README's section run."""

import re
from pathlib import Path

import pytest
from PIL import Image

from qtvit.checkpoints import ModelInfo, save_model
from qtvit.models import build_model
from qtvit_cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explain.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((200, 150), 90).convert("RGB").save("cat.jpg")
    for kernel in ("taylor2", "relu", "softmax"):
        args = {"num_classes": 2, "kernel": kernel}
        info = ModelInfo("qtvit_nano", args, ["cat", "dog"], {"size": [32, 32]})
        Path("runs", kernel).mkdir(parents=True)
        save_model(Path("runs", kernel, "best.safetensors"), build_model("qtvit_nano", **args).state_dict(), info)
    text = PAGE.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^qtvit (explain .*?)(?: +#.*)?$", text + readme, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert main(command.split()) == 0
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    written = {path.name for path in tmp_path.iterdir()}
    assert {"cat-attention.npy", "cat-focus.png", "kernels-attention-3.npy", "layers.png", "focus.png"} <= written
