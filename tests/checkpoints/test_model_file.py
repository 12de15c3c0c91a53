from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtvit.checkpoints import ModelInfo, load_model, save_model
from qtvit.models import build_model

PREPROCESS = {"size": [32, 32]}


@pytest.fixture
def info() -> ModelInfo:
    return ModelInfo("qtvit_nano", {"num_classes": 3, "img_size": [16, 24]}, ["a", "b", "c"], PREPROCESS)


def test_round_trip(info: ModelInfo, tmp_path: Path) -> None:
    model = build_model(info.model, **info.model_args).eval()
    model.to(memory_format=torch.channels_last)
    save_model(tmp_path / "best.safetensors", model.state_dict(), info)
    loaded, read = load_model(tmp_path)
    assert (read.model, read.model_args, read.classes) == (info.model, info.model_args, info.classes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_failed_write_leaves_the_old_file(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    state_dict = build_model(info.model, **info.model_args).state_dict()
    save_model(path, state_dict, info)
    before = path.read_bytes()

    def full_disk(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("qtvit.checkpoints.model_file.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(path, state_dict, info)
    assert path.read_bytes() == before


def test_weights_that_do_not_fit(info: ModelInfo, tmp_path: Path) -> None:
    other = build_model(info.model, num_classes=4, img_size=(16, 24))
    save_model(tmp_path / "x.safetensors", other.state_dict(), info)
    with pytest.raises(ValueError, match=r"do not fit qtvit_nano: size mismatch for head\.fc\.weight") as error:
        load_model(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_a_file_of_another_version(info: ModelInfo, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"qtvit": '{"model": "qtvit_1", "novelty": 1}'})
    with pytest.raises(ValueError, match="another version of qtvit"):
        load_model(path)


def test_files_that_are_no_model_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not one that `qtvit train` wrote"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no such run folder or model file"):
        load_model(tmp_path / "nowhere")
