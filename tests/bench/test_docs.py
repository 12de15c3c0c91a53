"""The example of docs/benchmarks.md runs, and the options of its commands and the README's exist."""

import re
import shlex
from pathlib import Path

import pytest

from qtvit_cli import _parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick")
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "benchmarks.md", "exec"), {})
    assert capsys.readouterr().out.count(" ms {'median': ") == 2


def test_the_commands_are_understood() -> None:
    text = (PAGE + (ROOT / "README.md").read_text(encoding="utf-8")).replace("\\\n", "")
    commands = re.findall(r"^qtvit (bench .*)$", text, re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        _, rest = _parser().parse_known_args(shlex.split(command, comments=True))
        assert not rest, command
