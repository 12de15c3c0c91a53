"""Models on the Hugging Face Hub, under the names that timm has for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from qtvit import console
from qtvit.version import __version__

HUB, LOCAL = "hf-hub:", "local-dir:"
"""What the names of models on the Hub and of folders begin with, in ``timm.create_model`` and here."""
HUB_FILE = "model.safetensors"
"""Name of the model file on the Hub, which timm looks for too."""
_HTTP_ERRORS: tuple[Any, ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in ("builtins", "huggingface_hub")
)
"""What the HTTP library of huggingface_hub, which is another one in each major version, raises without a connection."""


def locate(name: str | Path) -> Path:
    """The file or folder that ``name`` stands for: "hf-hub:USER/MODEL" (or USER/MODEL@REVISION) is downloaded, unless
    it is in huggingface_hub's cache; "local-dir:DIR" is DIR; all else is a path.

    Raises:
        FileNotFoundError: there is no such model on the Hub, or no model file in it.
        ValueError: not the name of a model on the Hub.
        OSError: the Hub cannot be reached, or refuses.
    """
    kind, colon, model = str(name).partition(":")
    if kind + colon == LOCAL:
        return Path(model)
    if kind + colon != HUB:
        return Path(name)
    repo_id, _, revision = model.partition("@")
    with hub_errors(str(name)):
        return Path(
            hf_hub_download(
                repo_id, HUB_FILE, revision=revision or None, library_name="qtvit", library_version=__version__
            )
        )


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Within this context, what fails on the Hub raises errors of one line that begin with ``name``. ``--quiet`` holds
    for huggingface_hub's progress bars too.
    """
    hide = console.is_quiet() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{name}: not the name of a model on the Hub, which is USER/MODEL ({error})") from error
    except GatedRepoError as error:
        raise PermissionError(f"{name}: access to this model has to be asked for, on its page") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such model on the Hub, or a private one that you cannot see (`hf auth login`, or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: the model has no such revision") from error
    except LocalEntryNotFoundError as error:
        why = _one_line(error.__cause__ or error)
        raise FileNotFoundError(f"{name}: not in the cache, and the Hub cannot be reached ({why})") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no {HUB_FILE} in this model on the Hub") from error
    except HfHubHTTPError as error:
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
