"""Publishing a model on the Hugging Face Hub: a folder that timm loads, with a model card."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from torch import nn

from qtvit import console
from qtvit.files import open_folder, write_text
from qtvit.version import __version__

from .hub import HUB, HUB_FILE, hub_errors
from .model_card import model_card
from .model_file import BEST, ModelInfo, find_model_file, load_model, own_args, save_model

CARD = "README.md"
NOT_OF_THESE_WEIGHTS = (
    *("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes", "label_offset"),
    *("test_input_size", "test_crop_pct", "test_pool_size"),
)
"""Fields of ``pretrained_cfg`` about the weights that timm itself has for a network."""


def push_model(
    run: str | Path,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    private: bool = False,
    license: str | None = None,
    dataset: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub: model.safetensors, timm's config.json, and a model card, README.md.

    A README.md in the folder of ``run`` is used as the card. Otherwise the card is generated, but never replaces one on
    the Hub, which somebody may have edited.

    Args:
        run: the model, as for `load_model`.
        repo_id: "USER/MODEL"; created if it does not exist.
        folder: new folder to write the files to, instead of uploading them.
        private: create a private repository.
        license: the Hub's identifier of the weights' licence, such as "apache-2.0".
        dataset: the Hub's identifier of the training data, such as "uoft-cs/cifar10".

    Returns:
        The model's URL, or ``folder``.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; or options that contradict each other or existing files.
        OSError: the Hub cannot be reached or refuses; or a file cannot be written.
    """
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id}: not the name of a model on the Hub, which is USER/MODEL")
    model, info = load_model(run, task="classify")
    source = _folder(run)
    written = source / CARD if source is not None and (source / CARD).is_file() else None
    if written:
        if license or dataset:
            raise ValueError(f"license and dataset are for a new model card, and there is {written}; say it there")
        card = written.read_text(encoding="utf-8")
    else:
        card = str(model_card(model, info, repo_id, source, license=license, dataset=dataset))

    if folder is not None:
        if private:
            raise ValueError(f"private is for models on the Hub, not for a folder, {folder}")
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists already and is not empty; name another folder")
        _write_files(open_folder(path), model, info)
        write_text(path / CARD, card)
        return str(path)

    with hub_errors(repo_id), TemporaryDirectory() as temporary:
        if get_token() is None:
            raise PermissionError(f"{repo_id}: you are not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
        _write_files(Path(temporary), model, info)
        api = HfApi(library_name="qtvit", library_version=__version__)
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is on the Hub already, and public; make it private in its settings")
        if written or not api.file_exists(repo_id, CARD):
            write_text(Path(temporary) / CARD, card)
        else:
            console.say(f"the {CARD} that {repo_id} has stays; put one into the folder of {run} to replace it")
        api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message=f"Push {info.model}")
        return str(address)


def _folder(run: str | Path) -> Path | None:
    """The run folder or local copy of a Hub model that ``run`` names; None for other files and models on the Hub."""
    file = find_model_file(run)
    return file.parent if file.name in (BEST, HUB_FILE) and not str(run).startswith(HUB) else None


def _write_files(folder: Path, model: nn.Module, info: ModelInfo) -> None:
    """Write the model file, and the config.json from which ``timm.create_model`` builds the network.

    timm writes config.json, but from what it knows of its own weights for the network; that part is replaced.
    """
    save_model(folder / HUB_FILE, model.state_dict(), info)
    path: Any = folder / "config.json"  # timm asks for a str; its earlier versions need a Path
    labels: dict[str, Any] = {"label_names": info.classes} if info.classes else {}
    imagenet = ImageNetInfo()
    if info.classes == imagenet.label_names():
        labels["label_descriptions"] = imagenet.label_descriptions(as_dict=True)
    save_config_for_hf(model, path, model_config=labels, model_args=own_args(info.model_args))
    config = json.loads(path.read_text(encoding="utf-8"))
    pretrained = config["pretrained_cfg"]
    for name in NOT_OF_THESE_WEIGHTS:
        pretrained.pop(name, None)
    preprocess = dict(info.preprocess)
    input_size = [getattr(model, "in_chans", 3), *preprocess.pop("size")]
    pretrained.update(preprocess, input_size=input_size, crop_mode="center", num_classes=config["num_classes"])
    write_text(path, json.dumps(config, indent=2) + "\n")
