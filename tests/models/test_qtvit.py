"""The network: sizes and costs, any input shape, precisions, initialisation, and timm's interface in short."""

import re
from collections.abc import Callable, Mapping

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qtvit.layers import MultiScaleAttention, Residual
from qtvit.models import ARCHITECTURES, Architecture, QTViT
from qtvit.models.qtvit import AttentionBlock
from qtvit.ops import KERNELS, reference_attention

Architectures = Mapping[str, Architecture]
Randomize = Callable[..., nn.Module]

FAMILIES = ["b", "l", "nano"]

# Millions of parameters, billions of MACs at 224 px, measured on the release.
RELEASED_COST = {
    "qtvit_1": (9.35, 0.520),
    "qtvit_2": (24.86, 1.586),
    "qtvit_3": (49.70, 3.956),
    "qtvit_4": (52.96, 5.259),
    "qtvit_5": (64.11, 6.951),
    "qtvit_6": (246.84, 27.588),
}


def meta_model(name: str, **kwargs: object) -> QTViT:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def image(*size: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_near(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the reference's largest entry."""
    assert ours.shape == reference.shape
    error = (ours.double() - reference.double()).abs().max() / reference.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", RELEASED_COST)
def test_size_and_cost(name: str) -> None:
    model = meta_model(name)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    params, macs = RELEASED_COST[name]
    assert num_params(model) / 1e6 == pytest.approx(params, rel=0.005)
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.005)


def test_nano_is_small_and_attends_to_many_tokens() -> None:
    model = meta_model("qtvit_nano")
    sizes = set()
    for module in model.modules():
        if isinstance(module, MultiScaleAttention):
            module.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape[-2:])))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    assert sizes == {(16, 16), (8, 8)}
    assert num_params(model) <= 450_000


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_rectangle(
    family: str,
    kernel: str,
    tiny_architectures: Architectures,
    randomize: Randomize,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomize(QTViT(tiny_architectures[family], num_classes=10, kernel=kernel), 0).eval()
    sizes = [(97, 211), (211, 97), (64, 64), (33, 47), (1, 1)]
    shrink = 4 if family == "nano" else 1  # it attends at stride 2: keep N x N small
    images = [image(-(-height // shrink), -(-width // shrink)) for height, width in sizes]
    fast = [(model.forward_features(x), model(x)) for x in images]

    def slow(q: Tensor, k: Tensor, v: Tensor, kernel: str, scalars: Mapping[str, Tensor]) -> Tensor:
        wide = {name: scalar.double() for name, scalar in scalars.items()}
        return reference_attention(q.mT.double(), k.mT.double(), v.mT.double(), kernel, **wide).mT.to(v.dtype)

    monkeypatch.setattr("qtvit.layers.attention.linear_attention_cf", slow)
    reduction = model.feature_info[-1]["reduction"]
    for x, (features, logits) in zip(images, fast, strict=True):
        assert features.shape[-2:] == tuple(-(-side // reduction) for side in x.shape[-2:])
        assert_near(features, model.forward_features(x), 1e-5)
        assert_near(logits, model(x), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["model", "autocast"])
def test_half_precision(
    family: str, dtype: torch.dtype, how: str, tiny_architectures: Architectures, randomize: Randomize
) -> None:
    model = randomize(QTViT(tiny_architectures[family], num_classes=10), 0).eval()
    x = image(65, 97, batch=4)
    with torch.no_grad():
        full = model(x)
    if how == "model":
        model, x = model.to(dtype), x.to(dtype)
    autocast = torch.autocast("cpu", dtype, enabled=how == "autocast")
    with torch.no_grad(), autocast:
        half = model(x)
    assert half.dtype == dtype
    assert_near(half, full, 8 * torch.finfo(dtype).eps)

    with autocast:
        logits = model.train()(x)
    logits.float().logsumexp(-1).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(family: str, tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures[family], num_classes=10), 0).train()
    model(image(64, 64, batch=2)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_norm_has_the_eps_of_its_family(name: str) -> None:
    eps = {module.eps for module in meta_model(name).modules() if hasattr(module, "eps")}
    assert eps == {1e-7 if name in ("qtvit_4", "qtvit_5", "qtvit_6") else 1e-5}


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="droput"):
        timm.create_model("qtvit_nano", droput=0.1)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel 'tailor2'.*taylor2"):
        timm.create_model("qtvit_nano", kernel="tailor2")


def test_no_pooling(tiny_architectures: Architectures, randomize: Randomize) -> None:
    """Without a classifier the feature map, with one its logits at every position."""
    model = randomize(QTViT(tiny_architectures["b"], num_classes=10), 0).eval()
    x = image(96, 64)
    features = model.forward_features(x)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    randomize(model, 0).reset_classifier(7)
    logits = model(x)
    assert logits.shape == (1, 7, 3, 2)
    one_position = features[..., 2:3, 1:2]
    model.reset_classifier(0, "avg")
    dense = QTViT(tiny_architectures["b"], num_classes=7, global_pool="").eval()
    dense.load_state_dict({**model.state_dict(), **{k: v for k, v in dense.state_dict().items() if ".fc." in k}})
    pooled = QTViT(tiny_architectures["b"], num_classes=7).eval()
    pooled.load_state_dict(dense.state_dict())
    torch.testing.assert_close(dense(x)[..., 2, 1], pooled.forward_head(one_position))


@pytest.mark.parametrize("index", [0, 2, 4])
def test_pruned_to_a_stage(index: int, tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures["b"]), 0).eval()
    x = image(64, 96)
    expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([index]) == [index]
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (expected.shape[1], expected.shape[1], 0)
    torch.testing.assert_close(model.forward_features(x), expected)
    torch.testing.assert_close(model(x), expected.mean((2, 3)))
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation(family: str, tiny_architectures: Architectures) -> None:
    model = QTViT(tiny_architectures[family], kernel="taylor2").train()
    branches = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5)
            assert abs(module.weight.mean().item()) < 0.02
            if module.bias is not None:
                assert not module.bias.any()
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            assert not module.bias.any()
            assert module.weight.unique().tolist() in ([0.0], [1.0])
        elif isinstance(module, MultiScaleAttention):
            assert not module.pos_embed.any()
            assert module.scalars["c"] == 1
        elif isinstance(module, (Residual, AttentionBlock)):
            branches += 1 if isinstance(module, Residual) else 2
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    silent = [
        name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.detach().any()
    ]
    assert len(silent) == branches
    assert all(name.endswith(("attn.proj.norm", "point_conv.norm", "conv2.norm")) for name in silent)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_branches_start_silent(family: str, tiny_architectures: Architectures) -> None:
    for stage in QTViT(tiny_architectures[family]).train().stages:
        x = stage[0](torch.randn(2, next(stage.parameters()).shape[1], 16, 16))
        assert x.std() > 0
        for block in stage[1:]:
            assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("family", "num_units"),
    [("b", 2 + 2 * 3), ("l", 1 + 1 + 2 + 1 + 2 * 2), ("nano", 2 + 2)],
)
def test_drop_path_rises_over_the_residual_units(
    family: str, num_units: int, tiny_architectures: Architectures
) -> None:
    """An attention block is two units, family L's stem block is one, family B's is none."""
    model = QTViT(tiny_architectures[family], drop_path_rate=0.3)
    rates = {name: float(m.drop_prob) for name, m in model.named_modules() if hasattr(m, "drop_prob")}
    assert list(rates.values()) == pytest.approx([0.3 * (i + 1) / num_units for i in range(num_units)])
    assert any(name.startswith("stages.0.") for name in rates) == (family == "l")
    attention = [name for name in rates if "attn" in name]
    assert len(attention) * 2 == sum("attn" in name or "local" in name for name in rates)
    assert all(not float(getattr(m, "drop_prob", 0)) for m in QTViT(tiny_architectures[family]).modules())


@torch.no_grad()
def test_drop_path_acts_in_training_only(tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures["b"], num_classes=10, drop_path_rate=0.99), 0)
    plain = randomize(QTViT(tiny_architectures["b"], num_classes=10), 0)
    x = image(64, 64, batch=2)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.allclose(model.train()(x), plain.train()(x))


@torch.no_grad()
def test_forward_is_features_then_head(tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures["b"], num_classes=10), 0).eval()
    x = image(64, 96, batch=2)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 3) == (2, 32, 2, 3)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size) == (2, 72)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.get_classifier()(hidden), model(x))

    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), hidden)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


def test_num_classes_in_chans_and_pooling_arguments() -> None:
    model = timm.create_model("qtvit_nano", num_classes=0, in_chans=1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, model.head_hidden_size)
    assert timm.create_model("qtvit_nano", num_classes=7)(image(32, 32, batch=2)).shape == (2, 7)
    unpooled = timm.create_model("qtvit_nano", num_classes=0, global_pool="")
    assert unpooled(image(32, 32, batch=2)).shape == (2, unpooled.num_features, 8, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_only(name: str) -> None:
    stages = ARCHITECTURES[name].stages
    model = meta_model(name, features_only=True)
    features = model(torch.empty(1, 3, 97, 211, device="meta"))
    reductions = [1, 2, 4] if name == "qtvit_nano" else [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [stage.width for stage in stages]
    assert model.feature_info.reduction() == reductions
    for feature, stage, reduction in zip(features, stages, reductions, strict=True):
        assert feature.shape == (1, stage.width, -(-97 // reduction), -(-211 // reduction))
    some = meta_model(name, features_only=True, out_indices=(0, 2))
    assert some.feature_info.reduction() == [reductions[0], reductions[2]]


@torch.no_grad()
def test_forward_intermediates(tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures["l"], num_classes=10), 0).eval()
    x = image(64, 96)
    last, every = model.forward_intermediates(x)
    assert len(every) == 5
    assert torch.equal(last, every[-1])
    assert torch.equal(last, model.forward_features(x))
    some = model.forward_intermediates(x, [1, 3], stop_early=True, intermediates_only=True)
    assert [torch.equal(ours, want) for ours, want in zip(some, every[1::2], strict=True)] == [True, True]
    assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_gradient_checkpointing_changes_nothing(tiny_architectures: Architectures, randomize: Randomize) -> None:
    model = randomize(QTViT(tiny_architectures["b"], num_classes=10), 0).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        x = image(64, 64, batch=2).requires_grad_()
        gradients = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
        statistics = [buffer.clone() for buffer in model.buffers()]
        results.append([*gradients, *statistics])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    ("img_size", "maps"),
    [(None, [(14, 14), (7, 7), (7, 7)]), (96, [(6, 6), (3, 3), (3, 3)]), ((100, 72), [(7, 5), (4, 3), (4, 3)])],
)
def test_img_size_lays_out_the_positional_maps(
    img_size: int | tuple[int, int] | None, maps: list[tuple[int, int]], tiny_architectures: Architectures
) -> None:
    model = QTViT(tiny_architectures["b"], img_size=img_size)
    assert [tuple(p.shape[-2:]) for name, p in model.named_parameters() if name.endswith("pos_embed")] == maps


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_weight_decay(kernel: str, tiny_architectures: Architectures) -> None:
    """Biases and norms are not decayed, but for the shortcut's norm weight; positional maps and kernel scalars are."""
    model = QTViT(tiny_architectures["b"], kernel=kernel)
    names = {name for name, _ in model.named_parameters()}
    exempt = {name for name in names if name.endswith((".bias", "norm.weight"))}
    exempt -= {name for name in names if name.endswith("shortcut_norm.weight")}
    assert model.no_weight_decay() == exempt


# Renaming any of these breaks people's checkpoints. "first" is block 0 of a stage, "block" any other.
STATE_DICT_MODULES = """
    block.attn.aggregate.0 block.attn.aggregate.1 block.attn.pos_embed block.attn.proj.conv block.attn.proj.norm
    block.attn.qkv block.attn.scalars.c block.attn.shortcut_norm
    block.local.depth_conv.conv block.local.inverted_conv.conv block.local.point_conv.conv block.local.point_conv.norm
    block.main.conv1.conv block.main.conv1.norm block.main.conv2.conv block.main.conv2.norm
    block.main.depth_conv.conv block.main.depth_conv.norm block.main.inverted_conv.conv block.main.inverted_conv.norm
    block.main.point_conv.conv block.main.point_conv.norm block.main.spatial_conv.conv block.main.spatial_conv.norm
    first.conv first.norm first.depth_conv.conv first.depth_conv.norm first.inverted_conv.conv first.inverted_conv.norm
    first.point_conv.conv first.point_conv.norm first.spatial_conv.conv first.spatial_conv.norm
    head.fc head.hidden head.in_conv.conv head.in_conv.norm head.norm
"""


def test_state_dict_keys_are_public(tiny_architectures: Architectures) -> None:
    modules = set()
    for family in FAMILIES:
        for key in QTViT(tiny_architectures[family]).state_dict():
            key = re.sub(r"^stages\.\d+\.0\.", "first.", key)
            key = re.sub(r"^stages\.\d+\.\d+\.", "block.", key)
            modules.add(re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", key))
    assert modules == set(STATE_DICT_MODULES.split())
