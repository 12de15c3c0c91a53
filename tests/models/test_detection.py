"""Detectors: torchvision's interface on any of our networks, at any image size, in half precision; and their sizes."""

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads

from qtvit.models import Architecture, Detector, QTViT, build_detector, build_model, load_backbone
from qtvit.models import qtvit as variants
from qtvit.models.detection import StrideAnchors

Architectures = Mapping[str, Architecture]

KEYS = json.loads((Path(__file__).parent / "detector_keys.json").read_text())
PUBLISHED_PARAMS = {"qtvit_1": 57.9, "qtvit_2": 68.5, "qtvit_3": 93.1}
KINDS: dict[str, dict[str, Any]] = {"faster": {"masks": False}, "mask": {}, "cascade": {"cascade": True}}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


@pytest.fixture
def build(tiny_architectures: Architectures, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A detector on a shrunken network: ``build(family, **args)``."""
    for family, name in {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}.items():
        monkeypatch.setitem(variants.ARCHITECTURES, name, tiny_architectures[family])
    names = {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}
    small = {"num_classes": 2, "min_size": 64, "max_size": 96, "fpn_chans": 16, "box_dim": 32, "rois_per_image": 32}
    return lambda family="b", **args: build_detector(names[family], **{**small, **args})


def scene(height: int = 64, width: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """A red and a blue rectangle before grey, with the target."""
    boxes = [[0.1, 0.15, 0.4, 0.6], [0.5, 0.4, 0.9, 0.95]]
    corners = (torch.tensor(boxes) * torch.tensor([width, height, width, height])).round()
    image, masks = torch.full((3, height, width), 0.5), torch.zeros(2, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(corners.int().tolist()):
        image[:, top:bottom, left:right] = torch.tensor([1.0, 0.0, 0.0]).roll(2 * i)[:, None, None]
        masks[i, top:bottom, left:right] = 1
    return image, {"boxes": corners, "labels": torch.tensor([1, 2]), "masks": masks}


def nothing(height: int, width: int) -> dict[str, Tensor]:
    empty = torch.zeros(0, height, width, dtype=torch.uint8)
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": empty}


def num_params(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_the_cascade_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        cascade = build_detector(name, num_classes=80, cascade=True)
        plain = build_detector(name, num_classes=80)
    assert round(num_params(cascade), 1) == PUBLISHED_PARAMS[name]
    heads = num_params(plain) - num_params(plain.body)
    assert heads == pytest.approx(20.1, abs=0.1)
    assert num_params(cascade) - num_params(cascade.body) == pytest.approx(53.0, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys(kind: str, build: Any) -> None:
    names = list(build(**KINDS[kind]).state_dict())
    assert [name for name in names if not name.startswith("backbone.body.")] == KEYS[kind]
    body = build_model("qtvit_1").state_dict()
    assert [name.removeprefix("backbone.body.") for name in names if name.startswith("backbone.body.")] == [
        name for name in body if not name.startswith("head.")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["b", "l", "nano"])
def test_every_parameter_learns(kind: str, family: str, build: Any, randomize: Any) -> None:
    image, target = scene()
    detector = build(family, **KINDS[kind]).train()
    randomize(detector.body)
    losses = detector([image, image.flip(2)], [target, nothing(64, 96)])
    assert losses.keys() == LOSSES - ({"loss_mask"} if kind == "faster" else set())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_overfits_two_rectangles(kind: str, build: Any) -> None:
    image, target = scene()
    detector = build("nano", **KINDS[kind], fpn_norm=True).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        optimizer.step()
    found = detector.eval()([image])[0]
    print(found["boxes"], found["labels"], found["scores"])
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        best = (found["labels"] == label).nonzero()[0, 0]
        left, top = torch.maximum(box, found["boxes"][best])[:2]
        right, bottom = torch.minimum(box, found["boxes"][best])[2:]
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, found["boxes"][best])]
        overlap = (right - left) * (bottom - top)
        print(overlap / (sum(areas) - overlap))
        ours = found["masks"][best, 0] >= 0.5
        print((ours & mask.bool()).sum() / (ours | mask.bool()).sum())
