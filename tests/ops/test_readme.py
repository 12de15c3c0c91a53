"""The example in the derivation runs."""

import re
from pathlib import Path

import qtvit.ops


def test_example_runs() -> None:
    text = Path(qtvit.ops.__file__).with_name("README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
