from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from qtvit.bench.candidates import Candidate, fold_batch_norms, inference_form, settle
from qtvit.bench.released import ReleasedAttention
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.models import QTViT, build_model, model_cost


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qtvit_1", ("qtvit_1", None, "inference")),
        ("qtvit_1:softmax", ("qtvit_1", "softmax", "inference")),
        ("plain:qtvit_1:relu", ("qtvit_1", "relu", "as trained")),
        ("released:runs/a:b", ("runs/a:b", None, "as released")),
        ("hf-hub:me/photos", ("hf-hub:me/photos", None, "inference")),
    ],
)
def test_names(text: str, expected: tuple[str, str | None, str]) -> None:
    candidate = Candidate.parse(text)
    assert (candidate.source, candidate.kernel, candidate.form) == expected
    assert candidate.name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qtvit_9", "unknown model 'qtvit_9'; did you mean"),
        ("efficientvit_b0:softmax", "efficientvit_b0:softmax: only models of ours"),
        ("released:efficientvit_b0", "only models of ours"),
        ("qtvit_nano:softmaxx", "unknown model 'qtvit_nano:softmaxx'"),
    ],
)
def test_unknown(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assert Candidate.parse(text).module


def test_an_exported_file_has_to_be_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx: no such file"):
        assert Candidate.parse("nowhere.onnx").exported
    assert Candidate.parse("qtvit_1").exported is None


def test_a_model_file_is_taken_as_it_is(tmp_path: Path) -> None:
    model = build_model("qtvit_nano", num_classes=3)
    save_model(
        tmp_path / "best.safetensors", model.state_dict(), ModelInfo("qtvit_nano", {"num_classes": 3}, [*"abc"], {})
    )
    loaded = Candidate.parse(str(tmp_path)).module
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("name", ["qtvit_nano", "efficientvit_b0"])
def test_settled_networks_have_ordinary_activations(name: str) -> None:
    model = Candidate.parse(name).module
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.any()
            assert not module.training
            assert module.momentum == 0.1
            module.register_forward_hook(lambda module, inputs, output: sizes.append(float(output.std())))
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert min(sizes) > 0.1
    assert max(sizes) < 10


@pytest.mark.parametrize("name", ["qtvit_nano", "efficientvit_b0", "mobileone_s0", "shvit_s1"])
@torch.no_grad()
def test_the_inference_form_has_the_same_outputs_and_no_norms(name: str) -> None:
    model = Candidate.parse(name).module
    form = inference_form(model, (64, 96))
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in form.modules())
    x = torch.randn(2, 3, 64, 96)
    want = model(x)
    torch.testing.assert_close(form(x), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
def test_a_norm_whose_convolution_is_read_elsewhere_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.norm.running_var.fill_(7)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.norm(x) + x

    model = Both().eval()
    x = torch.randn(1, 3, 5, 5)
    folded = fold_batch_norms(model, x)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert torch.equal(folded(x), model(x))


@torch.no_grad()
def test_what_a_norm_of_timm_does_besides_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4))
    settle_one(model)
    x = torch.randn(1, 3, 6, 6)
    folded = fold_batch_norms(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert (folded(x) >= 0).all()
    torch.testing.assert_close(folded(x), model(x))


def settle_one(model: nn.Module) -> None:
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    settle(model)


def test_forms() -> None:
    plain, released = Candidate.parse("plain:qtvit_nano"), Candidate.parse("released:qtvit_nano")
    assert plain.measured((32, 32)) is plain.module
    assert any(isinstance(module, ReleasedAttention) for module in released.measured((32, 32)).modules())


def test_macs_are_those_of_the_cheaper_form() -> None:
    candidate = Candidate.parse("mobileone_s0")
    model, form = candidate.module, candidate.measured((64, 64))
    assert (
        candidate.num_macs(form, (64, 64)) == model_cost(form, (64, 64)).num_macs < model_cost(model, (64, 64)).num_macs
    )


def test_kernels_are_built(randomize: Callable[..., nn.Module]) -> None:
    model = Candidate.parse("qtvit_nano:relu").module
    assert isinstance(model, QTViT)
    assert model.kernel == "relu"
