"""The commands that the README and the documentation show exist, with all their options; the README's Python runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qtvit import tasks
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.models import build_model
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.training.options import parse_config
from qtvit_cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The ``qtvit`` commands in shell blocks, without comments and the name."""
    text = "".join(re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)).replace("\\\n", "")
    lines = re.findall(r"^(?:torchrun .* -m )?qtvit (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in commands(page):
        if argv[0] != "ablate" and "…" in argv:  # options of the reader's own
            argv = argv[: argv.index("…")]
        args, rest = _parser().parse_known_args(argv)
        if getattr(args, "own_options", False):
            kind = tasks.get(args.task).load("config") if argv[0] == "train" else ClassifyConfig
            given = [option.partition("=")[0] for option in rest if option.startswith("--")]
            options = rest if given else []
            if {"--resume", "--recipe"}.isdisjoint(given):
                parse_config([*options, *([] if "--data" in given else ["--data", "d"])], kind)
        else:
            assert not rest, argv


def test_there_are_commands() -> None:
    counts = {page.stem: len(commands(page)) for page in PAGES}
    assert counts["README"] > 20
    assert sum(counts.values()) > 60


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((75, 50), 90).convert("RGB").save("cat.jpg")
    args: dict[str, Any] = {"num_classes": 2}
    Path("runs", "qtvit_1-photos").mkdir(parents=True)
    info = ModelInfo("qtvit_nano", args, ["cat", "dog"], {"size": [32, 32]})
    save_model(Path("runs/qtvit_1-photos/best.safetensors"), build_model("qtvit_nano", **args).state_dict(), info)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("qtvit.train_classifier", lambda **options: calls.append(options))
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block.replace('"qtvit_3"', '"qtvit_0"'), "README.md", "exec"), {})
    assert len(blocks) == 4
    [options] = calls
    parse = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, dict)]
    parse += [f"--optim.{name}={value}" for name, value in options["optim"].items()]
    assert parse_config(parse, ClassifyConfig).optim.layer_decay == options["optim"]["layer_decay"]
