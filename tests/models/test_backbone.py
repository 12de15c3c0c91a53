"""Backbones of dense tasks, and the weights of classifiers in them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qtvit.models import ARCHITECTURES, Architecture, build_model, load_backbone
from qtvit.models.backbone import Backbone
from qtvit.models.foreign import released_name

Randomize = Callable[[nn.Module, int], nn.Module]
OTHER = "test_resnet"
"""A model of timm's; it has a stem besides its stages."""


@pytest.fixture(autouse=True)
def _tiny(tiny_architectures: Mapping[str, Architecture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "qtvit_1", tiny_architectures["b"])


@pytest.fixture
def classifier(randomize: Randomize) -> Any:
    return randomize(build_model("qtvit_1", num_classes=5), 0).eval()


def build_backbone(model: str, **model_args: Any) -> Any:
    return Backbone(build_model(model, **model_args))


def pixels(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_same_maps(backbone: nn.Module, classifier: Any, x: Tensor) -> None:
    """The backbone's maps are bit for bit those of the classifier's stages."""
    with torch.no_grad():
        want = classifier.forward_intermediates(x, intermediates_only=True)
        for ours, stage in zip(backbone.eval()(x), want, strict=True):
            assert torch.equal(ours, stage)


@pytest.mark.parametrize("model_args", [{}, {"num_classes": 7, "global_pool": "avg"}], ids=str)
def test_weights_of_a_classifier(classifier: Any, model_args: dict[str, Any] | None) -> None:
    backbone = build_backbone("qtvit_1", **model_args)
    assert backbone.channels == [8, 16, 16, 24, 32]
    assert backbone.strides == [2, 4, 8, 16, 32]
    assert not any("head" in name for name in backbone.state_dict())
    dropped = load_backbone(backbone, classifier.state_dict())
    assert dropped == [name for name in classifier.state_dict() if name.startswith("head.")]
    for size in [(224, 224), (97, 211)]:
        assert_same_maps(backbone, classifier, pixels(*size))


def test_the_last_maps_alone(classifier: Any) -> None:
    backbone = Backbone(build_model("qtvit_1"), 2)
    load_backbone(backbone, classifier.state_dict())
    assert (backbone.channels, backbone.strides) == ([24, 32], [16, 32])
    x = pixels(64, 32)
    with torch.no_grad():
        want = classifier.forward_intermediates(x, intermediates_only=True)[-2:]
        assert all(torch.equal(*pair) for pair in zip(backbone.eval()(x), want, strict=True))


def test_weights_with_the_names_of_the_release(classifier: Any) -> None:
    cfg = ARCHITECTURES["qtvit_1"]
    backbone = build_backbone("qtvit_1")
    load_backbone(backbone, {released_name(key, cfg): value for key, value in classifier.state_dict().items()})
    assert_same_maps(backbone, classifier, pixels(64, 96))


def test_positional_maps_are_resized(classifier: Any) -> None:
    backbone = build_backbone("qtvit_1", img_size=(64, 96))
    load_backbone(backbone, classifier.state_dict())
    assert backbone.body.stages[3][1].attn.pos_embed.shape[-2:] == (4, 6)
    assert_same_maps(backbone, classifier, pixels(64, 96))


def test_weights_of_another_model(randomize: Randomize) -> None:
    classifier: Any = randomize(timm.create_model(OTHER, num_classes=4), 0).eval()
    backbone = build_backbone(OTHER)
    assert load_backbone(backbone, classifier.state_dict()) == ["fc.weight", "fc.bias"]
    x = pixels(64, 64)
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)[-1], classifier.forward_features(x))


def test_weights_that_do_not_fit(classifier: Any) -> None:
    backbone = build_backbone("qtvit_1")
    state = classifier.state_dict()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    missing = {name: value for name, value in state.items() if name != "stages.1.0.depth_conv.conv.weight"}
    with pytest.raises(ValueError, match=r"weights of this QTViT: stages\.1\.0\.depth_conv\.conv\.weight is missing$"):
        load_backbone(backbone, missing)
    with pytest.raises(ValueError, match=r"weights of this QTViT: neck\.weight is not of this model$"):
        load_backbone(backbone, {**state, "neck.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"stages\.0\.0\.norm\.bias has shape \(9,\), not \(8,\)$"):
        load_backbone(backbone, {**state, "stages.0.0.norm.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match="weights of a model with another kernel than taylor2"):
        load_backbone(backbone, build_model("qtvit_1", kernel="relu").state_dict())
    with pytest.raises(ValueError, match=r"is missing, .* is missing and \d+ more$"):
        load_backbone(build_backbone(OTHER), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_network_without_maps() -> None:
    with pytest.raises(ValueError, match="Linear gives no feature maps"):
        Backbone(nn.Linear(3, 3))


def test_maps_at_full_resolution_are_left_out_if_two_others_remain() -> None:
    nano = build_model("qtvit_nano")
    assert [stage["reduction"] for stage in nano.feature_info] == [1, 2, 4]
    backbone = Backbone(nano)
    assert (backbone.channels, backbone.strides) == ([48, 96], [2, 4])
    assert [tuple(x.shape) for x in backbone(pixels(16, 24))] == [(2, 48, 8, 12), (2, 96, 4, 6)]
    assert Backbone(build_model("qtvit_nano"), full_resolution=True).strides == [1, 2, 4]
    nano = build_model("qtvit_nano")
    del nano.feature_info[0]
    nano.feature_info[0]["reduction"] = 1
    assert Backbone(nano).strides == [1, 4]
