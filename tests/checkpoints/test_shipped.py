"""The weights inside the package."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import qtvit
from qtvit.models import SHIPPED_WEIGHTS
from qtvit_cli import main

NANO = SHIPPED_WEIGHTS / "nano-cifar10.safetensors"


def test_they_are_small_halves_with_a_model_card() -> None:
    assert NANO.stat().st_size <= 1_000_000
    with safe_open(NANO, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys() if file.get_tensor(name).ndim > 1}  # noqa: SIM118
    assert dtypes == {torch.float16}
    card = NANO.with_suffix(".md").read_text()
    top1 = qtvit.load("nano-cifar10").info.metrics["top1"]
    assert f"{top1:.2f} %" in card


def test_every_way_to_them_leads_to_the_same_model() -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = qtvit.load("nano-cifar10").model(images)
        for name in ("qtvit_nano", "qtvit_nano.cifar10"):
            assert torch.equal(timm.create_model(name, pretrained=True).eval()(images), expected)
    assert expected.std() > 0.5
    assert timm.list_models("qtvit*", pretrained=True) == ["qtvit_nano.cifar10"]


def test_their_positional_maps_fit_other_image_sizes() -> None:
    images = torch.randn(1, 3, 64, 48)
    models = [timm.create_model("qtvit_nano", pretrained=True, **size).eval() for size in ({}, {"img_size": (64, 48)})]
    assert models[1].stages[1][1].attn.pos_embed.shape[2:] == (32, 24)
    with torch.inference_mode():
        torch.testing.assert_close(models[0](images), models[1](images))


def test_they_transfer() -> None:
    model = timm.create_model("qtvit_nano", pretrained=True, num_classes=3)
    own, shipped = model.state_dict(), qtvit.load("nano-cifar10").model.state_dict()
    same = {name for name, tensor in own.items() if tensor.shape == shipped[name].shape}
    assert own.keys() - same == {"head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(own[name], shipped[name]) for name in same)


def test_they_predict_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "skyblue").save("sky.png")
    assert main(["predict", "nano-cifar10", "sky.png"]) == 0
    assert capsys.readouterr().out.split()[1] in qtvit.load("nano-cifar10").classes
    assert main(["predict", "nano-cifar", "sky.png"]) == 2
    assert "no such run folder or model file (with the package comes: nano-cifar10)" in capsys.readouterr().err
