"""The network against tensors of the authors' release: outputs, gradients, and the names of its weights."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from qtvit.models import ARCHITECTURES, Architecture, QTViT
from qtvit.models.architectures import _family_b, _family_l
from qtvit.models.foreign import released_name
from qtvit.models.qtvit import checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "released_state_dict_shapes.json").read_text())
TINY = {
    "tiny_b": Architecture(_family_b((8, 16, 24, 32, 48), (1, 1, 1, 1, 1)), 8, (64, 72)),
    "tiny_l": Architecture(
        _family_l((8, 16, 16, 32, 48), (1, 1, 1, 1, 1)), 8, (64, 72), act="gelu_tanh", norm_eps=1e-7
    ),
}


class Golden(NamedTuple):
    model: QTViT
    tensors: dict[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(params=TINY)
def golden(request: pytest.FixtureRequest) -> Golden:
    golden = Golden(QTViT(TINY[request.param], num_classes=10), load_file(GOLDEN / f"{request.param}.safetensors"))
    golden.model.load_state_dict(checkpoint_filter_fn(golden.under("weights/"), golden.model))
    return golden


@torch.no_grad()
@pytest.mark.parametrize("size", [96, 224, 288])
def test_logits(golden: Golden, size: int) -> None:
    logits = golden.model.eval()(golden.tensors[f"{size}/input"])
    torch.testing.assert_close(logits, golden.tensors[f"{size}/logits"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_stages(golden: Golden) -> None:
    features, stages = golden.model.eval().forward_intermediates(golden.tensors["96/input"])
    want = golden.under("96/stage")
    assert len(stages) == len(want) == 5
    for i, stage in enumerate(stages):
        torch.testing.assert_close(stage, want[str(i)], rtol=0, atol=1e-5, msg=lambda text, i=i: f"stage {i}: {text}")
    assert features is stages[-1]


def test_training_step(golden: Golden) -> None:
    x = golden.tensors["96/input"].requires_grad_()
    model = golden.model.train()
    logits = model(x)
    loss = F.cross_entropy(logits, golden.tensors["train/targets"])
    loss.backward()
    torch.testing.assert_close(logits, golden.tensors["train/logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, golden.tensors["train/loss"].squeeze(), rtol=0, atol=1e-5)

    want = golden.under("train/grad/") | {"input": golden.tensors["train/grad_input"]}
    ours = {released_name(name, model.cfg): parameter.grad for name, parameter in model.named_parameters()}
    ours["input"] = x.grad
    assert ours.keys() == want.keys()
    for name, grad in ours.items():
        largest = want[name].abs().max()
        assert (grad - want[name]).abs().max() <= 1e-4 * largest + 1e-6, name


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_the_released_ones(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    ours = model.state_dict()
    image = {released_name(key, ARCHITECTURES[name]): list(value.shape) for key, value in ours.items()}
    assert len(image) == len(ours)
    assert image == SHAPES[name]["keys"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_released_checkpoint_loads_strictly(golden: Golden, wrapped: bool) -> None:
    weights = golden.under("weights/")
    model = QTViT(golden.model.cfg, num_classes=10)
    checkpoint = {"state_dict": weights, "ema": {0.9998: weights}} if wrapped else weights
    loaded = checkpoint_filter_fn(checkpoint, model)
    model.load_state_dict(loaded, strict=True)
    assert checkpoint_filter_fn(loaded, model).keys() == loaded.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[released_name(key, model.cfg)]), key


def test_foreign_names_are_not_dropped(golden: Golden) -> None:
    loaded = checkpoint_filter_fn({**golden.under("weights/"), "surprise": torch.zeros(1)}, golden.model)
    with pytest.raises(RuntimeError, match="surprise"):
        golden.model.load_state_dict(loaded)


@pytest.mark.parametrize("key", ["head.surprise.weight", "stages.0.weight", "stages.3.1.attn.surprise"])
def test_released_name_knows_its_keys_only(key: str) -> None:
    with pytest.raises(ValueError, match=r"surprise|stages\.0\.weight"):
        released_name(key, ARCHITECTURES["qtvit_1"])
