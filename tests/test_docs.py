"""The examples of docs/attention.md run, on smaller images."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("img_size = 1024", "img_size = 64"), str(PAGE), "exec"), {})
