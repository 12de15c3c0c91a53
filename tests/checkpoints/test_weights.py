"""Plain weights files, of the release and of others."""

import argparse
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from qtvit.checkpoints import identify_model, load_model, read_weights
from qtvit.models import ARCHITECTURES, build_model
from qtvit.models.foreign import released_name

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "released_state_dict_shapes.json").read_text())
Weights = dict[str, Tensor]


@pytest.fixture
def nano(randomize: Any) -> Weights:
    return randomize(build_model("qtvit_nano", num_classes=7), 0).state_dict()


def released(state_dict: Weights, name: str = "qtvit_nano") -> Weights:
    return {released_name(key, ARCHITECTURES[name]): value for key, value in state_dict.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_released_models_are_told_by_names_and_shapes(name: str) -> None:
    weights = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name]["keys"].items()}
    assert identify_model(weights) == (name, {"num_classes": 1000})


@pytest.mark.parametrize("name", ["qtvit_0", "qtvit_4"])
@pytest.mark.parametrize(
    "model_args",
    [
        {"num_classes": 0},
        {"num_classes": 5, "in_chans": 1, "img_size": [64, 96]},
        {"num_classes": 5, "img_size": [352, 256]},
    ],
)
def test_arguments_are_read_from_the_shapes(name: str, model_args: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours = build_model(name, **model_args).state_dict()
    assert identify_model(ours) == (name, model_args)
    assert identify_model(released(ours, name)) == (name, model_args)


def test_an_image_size_that_gives_the_same_maps_is_the_default() -> None:
    with torch.device("meta"):
        weights = build_model("qtvit_1", img_size=(210, 224)).state_dict()  # ceil(210 / 16) = 14 = 224 / 16
    assert identify_model(weights) == ("qtvit_1", {"num_classes": 1000})


def containers(weights: Weights) -> dict[str, Any]:
    """A file's name, and what it holds."""
    return {
        "plain.pth": weights,
        "released.pt": {"state_dict": released(weights), "ema": {0.9998: released(weights)}, "epoch": 3},
        "parallel.bin": {f"module.{key}": value for key, value in released(weights).items()},
        "compiled.pth.tar": {"state_dict": {f"module._orig_mod.{key}": value for key, value in weights.items()}},
        "half.pth": {key: value.half() if value.is_floating_point() else value for key, value in weights.items()},
        "plain.safetensors": released(weights),
    }


@pytest.mark.parametrize("file", containers({}))
def test_weights_files_load(file: str, nano: Weights, tmp_path: Path) -> None:
    content = containers(nano)[file]
    if file.endswith("safetensors"):
        save_file(content, tmp_path / file)
    else:
        torch.save(content, tmp_path / file)
    model, info = load_model(tmp_path / file)
    assert (info.model, info.model_args, info.task) == ("qtvit_nano", {"num_classes": 7}, "classify")
    assert info.classes == [f"class {i}" for i in range(7)]
    assert not model.training
    for key, value in model.state_dict().items():
        tolerance = 1e-2 if file.startswith("half") else 0
        torch.testing.assert_close(value, nano[key], rtol=tolerance, atol=tolerance)


def test_imagenet_weights_get_its_classes_and_the_published_protocol(tmp_path: Path) -> None:
    model = build_model("qtvit_0")
    torch.save({"state_dict": released(model.state_dict(), "qtvit_0")}, tmp_path / "qtvit_0.pt")
    _, info = load_model(tmp_path / "qtvit_0.pt")
    assert info.classes == ImageNetInfo().label_names()
    assert info.classes[0] == "n01440764"
    assert info.preprocess["size"] == [224, 224]
    assert (info.preprocess["crop_pct"], info.preprocess["interpolation"]) == (0.95, "bicubic")
    assert info.preprocess["mean"] == (0.485, 0.456, 0.406)
    assert info.preprocess["std"] == (0.229, 0.224, 0.225)


def test_another_image_size_is_the_one_to_preprocess_to(tmp_path: Path) -> None:
    torch.save(build_model("qtvit_nano", img_size=(48, 64)).state_dict(), tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth")[1].preprocess["size"] == [48, 64]


def test_arguments_can_be_added(nano: Weights, tmp_path: Path) -> None:
    torch.save(nano, tmp_path / "x.pth")
    model, info = load_model(tmp_path / "x.pth", drop_rate=0.3)
    assert info.model_args == {"num_classes": 7, "drop_rate": 0.3}
    assert model.head.drop.p == 0.3


def test_the_tensors_are_read_as_they_are(nano: Weights, tmp_path: Path) -> None:
    torch.save({"state_dict": released(nano), "ema": {0.9: {}}}, tmp_path / "x.pth")
    read = read_weights(tmp_path / "x.pth").tensors
    assert read.keys() == released(nano).keys()
    assert all(torch.equal(read[key], value) for key, value in released(nano).items())


class Malice:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(legacy: bool, nano: Weights, tmp_path: Path) -> None:
    path, marker = tmp_path / "x.pth", tmp_path / "marker"
    torch.save(
        {"state_dict": nano, "extra": Malice(marker)},
        path,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=2,
    )
    with pytest.raises(ValueError, match=r"x\.pth: holds (posix|nt)\.mkdir, which is not loaded as it could") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(Malice(marker), protocol=2))
    with pytest.raises(ValueError, match=r"x\.pth: "):
        load_model(path)
    assert not marker.exists()


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return buffer.getvalue()


def broken_files(weights: Weights) -> list[tuple[Any, str]]:
    """What a .pth file holds, and what the error has to say."""
    resnet = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    wide = {**weights, "head.hidden.weight": torch.zeros(9, 9)}
    head = released(weights)
    head.pop("head.op_list.0.conv.weight", None)
    return [
        (b"", "an empty file (0 bytes); expected a state dict of tensors that torch.save wrote"),
        (b"<html>not found</html>", "a text file that begins with '<html>not found</html>'; expected"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer in place of the file"),
        (b"PK\x03\x04 cut short", "a file that is damaged, cut short or of another kind; expected"),
        (zip_of("a.txt", "b.txt"), "a zip archive of a.txt, b.txt; expected"),
        (zip_of("x/constants.pkl", "x/data.pkl"), "a TorchScript archive, not weights; expected"),
        (zip_of("x/data.pkl"), "a file of torch.save that is damaged or"),
        (safetensors({"a": torch.zeros(1)}), "a safetensors file by its content"),
        ([1, 2], "holds no state dict, but of type list"),
        (torch.zeros(2), "holds no state dict, but of type Tensor"),
        ({}, "holds no state dict, but an empty dict"),
        ({"state_dict": {}}, "holds no state dict, which has tensors by name alone: there is 'state_dict' (an empty"),
        (
            {"epoch": 3, **weights},
            "holds no state dict, which has tensors by name alone: there is 'epoch' (of type int)",
        ),
        ({0: torch.zeros(1)}, "which has tensors by name alone: there is 0 (of type Tensor)"),
        ({"ema": {0.9: weights}}, "there is 'ema' (of type dict); --ema takes the moving average"),
        ({"optimizer": {"state": {}}, "epoch": 1}, "there is 'optimizer' (of type dict), 'epoch' (of type int)"),
        ({"a": weights, "b": weights}, "holds several state dicts: a, b; save the one"),
        ({"args": argparse.Namespace(), **weights}, "holds argparse.Namespace, which is not loaded"),
        (
            {"state_dict": weights, "pytorch-lightning_version": "2.6", "qtvit": {}},
            "the state of a training run; give its run",
        ),
        (resnet, "not the weights of a model of ours; the first names in it are 0.weight, 0.bias, 1.weight"),
        ({**weights, "surprise": torch.zeros(1)}, "closest is qtvit_nano (unexpected 1: surprise)"),
        (wide, "closest is qtvit_nano (of another shape 1: head.hidden.weight (9, 9), not (128, 128))"),
        (head, "closest is qtvit_nano (missing 1: head.in_conv.conv.weight)"),
        (dict(list(weights.items())[:60]), "closest is qtvit_nano (missing 9"),
    ]


@pytest.mark.parametrize("index", range(len(broken_files({}))))
def test_files_that_are_not_understood(index: int, nano: Weights, tmp_path: Path) -> None:
    content, message = broken_files(nano)[index]
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.pth: ") as error:
        load_model(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    for read in (load_model, read_weights):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such"):
            read(tmp_path / "nowhere.pth")
