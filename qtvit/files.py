"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_folder(path: Path, *, exist_ok: bool = True) -> Path:
    """Make the folder and those above it, and check that files can be written there.

    Raises:
        FileExistsError: it is there already, and ``exist_ok`` is false.
        OSError: it cannot be made or written to; the message names it.
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
    """Write ``text`` as `replacing` does."""
    with replacing(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes ``path`` at the end: whatever happens, there is the old file or the new.

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
        temporary.chmod(mode)  # safetensors makes files that nobody else can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
