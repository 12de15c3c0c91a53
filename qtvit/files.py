"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file, then rename it to ``path``: a crash leaves the old file or the new one."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def temporary_name(path: Path) -> Path:
    """Where to write what is to become ``path``."""
    return path.with_name(f".{path.name}.tmp")
