"""Finding models on the Hugging Face Hub, under the names that timm uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import errors, hf_hub_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from qtvit import console
from qtvit.version import __version__

HUB, LOCAL = "hf-hub:", "local-dir:"
"""Prefixes for models on the Hub and in folders, in ``timm.create_model`` and here."""
HUB_FILE = "model.safetensors"
"""Name of the model file on the Hub; timm looks for it too."""
_HTTP_ERRORS: tuple[Any, ...] = tuple(
    base
    for base in errors.HfHubHTTPError.__mro__
    if base.__module__.split(".")[0] not in ("builtins", "huggingface_hub")
)
"""Base classes of the HTTP library's errors; huggingface_hub's major versions use different libraries."""


def locate(name: str | Path) -> Path:
    """The path of a model file or folder.

    "hf-hub:USER/MODEL" and "hf-hub:USER/MODEL@REVISION" are downloaded into huggingface_hub's cache, "local-dir:DIR" is
    DIR, and any other name is a path.

    Raises:
        FileNotFoundError: there is no such model on the Hub, or no model file in it.
        ValueError: not the name of a model on the Hub.
        OSError: the Hub cannot be reached, or refuses.
    """
    text = str(name)
    if text.startswith(LOCAL):
        return Path(text.removeprefix(LOCAL))
    if not text.startswith(HUB):
        return Path(name)
    repo_id, _, revision = text.removeprefix(HUB).partition("@")
    client: dict[str, Any] = {"library_name": "qtvit", "library_version": __version__}
    with hub_errors(text):
        return Path(hf_hub_download(repo_id, HUB_FILE, revision=revision or None, **client))


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the Hub's errors into built-in ones of one line that begin with ``name``.

    If ``--quiet`` is given, huggingface_hub's progress bars are off meanwhile.
    """
    hide = console.is_quiet() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: not the name of a model on the Hub, which is USER/MODEL ({error})") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{name}: access to this model has to be asked for, on its page") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such model on the Hub, or a private one that you cannot see (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: the model has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        why = _one_line(error.__cause__ or error)
        raise FileNotFoundError(f"{name}: not in the cache, and the Hub cannot be reached ({why})") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no {HUB_FILE} in this model on the Hub") from error
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        hint = "; `hf auth login` or HF_TOKEN say who you are" if refused else ""
        why = _one_line(error.server_message or error)
        raise (PermissionError if refused else OSError)(f"{name}: the Hub says no ({why}){hint}") from error
    except _HTTP_ERRORS as error:
        raise ConnectionError(f"{name}: the Hub cannot be reached ({_one_line(error)})") from error
    finally:
        if hide:
            enable_progress_bars()


def _one_line(message: object) -> str:
    return " ".join(str(message).split()).rstrip(".") or type(message).__name__
