from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtvit.checkpoints import ModelInfo, load_model, save_model
from qtvit.files import write_text
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


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond ``num_bytes``."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(info: ModelInfo, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    state_dict = build_model(info.model, **info.model_args).state_dict()
    save_model(path, state_dict, info)
    before = path.read_bytes()
    state_dict["head.fc.bias"] += 1
    with (
        full_disk(1_000_000),
        pytest.raises(OSError, match=r"best\.safetensors: cannot be .*too large") as error,
    ):
        save_model(path, state_dict, info)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_full_disk_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    with full_disk(1_000_000), pytest.raises(OSError, match="too large"):
        write_text(path, "new" * 1_000_000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_is_not_there(info: ModelInfo, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save_model(tmp_path / "gone" / "best.safetensors", {"a": torch.zeros(1)}, info)


def test_an_interrupted_write_leaves_nothing_behind(
    info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("qtvit.checkpoints.model_file.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "best.safetensors", {}, info)
    assert list(tmp_path.iterdir()) == []


def test_more_class_names_than_outputs(info: ModelInfo, tmp_path: Path) -> None:
    state_dict = build_model(info.model, **info.model_args).state_dict()
    save_model(tmp_path / "x.safetensors", state_dict, replace(info, classes=["a", "b"]))
    with pytest.raises(ValueError, match=r"x\.safetensors: names 2 classes, but its qtvit_nano has 3"):
        load_model(tmp_path / "x.safetensors")


def test_a_run_folder_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"no best\.safetensors in this folder"):
        load_model(tmp_path)


def test_weights_that_do_not_fit(info: ModelInfo, tmp_path: Path) -> None:
    other = build_model(info.model, num_classes=4, img_size=(16, 24))
    save_model(tmp_path / "x.safetensors", other.state_dict(), info)
    with pytest.raises(ValueError, match=r"do not fit qtvit_nano: size mismatch for head\.fc\.weight") as error:
        load_model(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
    save_model(tmp_path / "x.safetensors", {"head.fc.bias": torch.zeros(3), "scalars.c": torch.ones(1)}, info)
    with pytest.raises(ValueError, match=r"do not fit qtvit_nano: Missing key.* … \(1 more\)$") as error:
        load_model(tmp_path / "x.safetensors")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_file_of_another_version(info: ModelInfo, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"qtvit": '{"model": "qtvit_1", "novelty": 1}'})
    with pytest.raises(ValueError, match="another version of qtvit"):
        load_model(path)


def test_files_that_are_no_model_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.safetensors: an empty file \(0 bytes\); expected a safetensors file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: not the weights of a model of ours; the first names .* a$"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no such run folder or model file"):
        load_model(tmp_path / "nowhere")
