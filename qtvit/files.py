"""Writing files in one step, so that no half-written ones are left."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_folder(path: Path, *, exist_ok: bool = True) -> Path:
    """Create a folder with its parents, and check that files can be written there.

    Raises:
        FileExistsError: it exists, and ``exist_ok`` is false.
        OSError: it cannot be created or written to; the message names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        with tempfile.TemporaryFile(dir=path):
            return path
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{path}: cannot write to this folder ({error.strerror})") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with replacing(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` at the end, so that ``path`` is always the old file or the new one.

    After an error the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            temporary.touch()
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror})") from error
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors creates files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
