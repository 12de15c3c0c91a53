"""The network: sizes and costs, any input shape, precisions, initialisation, stochastic depth."""

from collections.abc import Callable, Mapping

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from qtvit.layers import DropPath, MultiScaleAttention, Residual, set_drop_path
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


def meta_model(name: str) -> QTViT:
    with torch.device("meta"):
        return timm.create_model(name).eval()


def drop_path_rates(model: nn.Module) -> dict[str, float]:
    return {name: m.drop_prob.item() for name, m in model.named_modules() if isinstance(m, DropPath)}


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
    if kernel in ("mean", "taylor1"):  # nothing bounds what these make of large tokens
        for module in model.modules():
            if isinstance(module, MultiScaleAttention):
                module.qkv.weight /= 32
                module.pos_embed /= 32
    sizes = [(97, 211), (211, 97), (64, 64), (33, 47), (1, 1)]
    shrink = 4 if family == "nano" else 1  # it attends at stride 2: keep N x N small
    images = [image(-(-height // shrink), -(-width // shrink)) for height, width in sizes]
    fast = [(model.forward_features(x), model(x)) for x in images]

    def slow(q: Tensor, k: Tensor, v: Tensor, kernel: str, scalars: Mapping[str, Tensor], eps: float | None) -> Tensor:
        wide = {name: scalar.double() for name, scalar in scalars.items()}
        return reference_attention(q.mT.double(), k.mT.double(), v.mT.double(), kernel, eps, **wide).mT.to(v.dtype)

    monkeypatch.setattr("qtvit.layers.attention.linear_attention_cf", slow)
    tolerance = 1e-5 if kernel.startswith("taylor2") else 2e-4  # random tokens are long, and these feel their length
    reduction = model.feature_info[-1]["reduction"]
    for x, (features, logits) in zip(images, fast, strict=True):
        assert features.shape[-2:] == tuple(-(-side // reduction) for side in x.shape[-2:])
        assert_near(features, model.forward_features(x), tolerance)
        assert_near(logits, model(x), tolerance)


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_norm_has_the_eps_of_its_family(name: str) -> None:
    eps = {module.eps for module in meta_model(name).modules() if hasattr(module, "eps")}
    assert eps == {1e-7 if name in ("qtvit_4", "qtvit_5", "qtvit_6") else 1e-5}


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel 'tailor2'.*taylor2"):
        timm.create_model("qtvit_nano", kernel="tailor2")


def test_kaiming_initialisation() -> None:
    model = timm.create_model("qtvit_nano")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    scaled = torch.cat([m.weight.flatten() * (m.weight[0].numel() / 2) ** 0.5 for m in convs])
    assert scaled.std().item() == pytest.approx(1, rel=0.02)
    assert model.head.hidden.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(arch.conv_init == "trunc_normal" for name, arch in ARCHITECTURES.items() if name != "qtvit_nano")


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
    rates = drop_path_rates(model)
    assert list(rates.values()) == pytest.approx([0.3 * (i + 1) / num_units for i in range(num_units)])
    assert any(name.startswith("stages.0.") for name in rates) == (family == "l")
    attention = [name for name in rates if "attn" in name]
    assert len(attention) * 2 == sum("attn" in name or "local" in name for name in rates)
    assert drop_path_rates(QTViT(tiny_architectures[family])) == {}


# qtvit_1 has 1 and 2 residual blocks in stages 1 and 2, then 3 and 4 of attention, at two units each. qtvit_4 has one
# in each of the first three stages, of which the recipe skips two, then 6, and 6 of attention.
@pytest.mark.parametrize(
    ("name", "rate", "skip", "rates", "first", "last"),
    [
        ("qtvit_1", 0.05, 0, [0.05 * i / 17 for i in range(1, 18)], "1.1.", "4.4.local_"),
        ("qtvit_4", 0.1, 2, [0.1 * i / 19 for i in range(1, 20)], "2.1.", "4.6.local_"),
    ],
)
def test_drop_path_of_the_recipe(name: str, rate: float, skip: int, rates: list[float], first: str, last: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=rate, drop_path_skip=skip)
    ours = {name: module.rate for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert list(ours.values()) == pytest.approx(rates)
    assert (next(iter(ours)), list(ours)[-1]) == (f"stages.{first}drop_path", f"stages.{last}drop_path")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be at least 0 and less than 1, got 1\.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate .* got -0\.1"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate .* got nan"),
        ({"drop_path_rate": 0.1, "drop_path_skip": 8}, "drop_path_skip must be a whole number from 0 to 7, got 8"),
        ({"drop_path_skip": -1}, "drop_path_skip .* got -1"),
        ({"drop_path_skip": 1.5}, r"drop_path_skip .* got 1\.5"),
    ],
)
def test_impossible_drop_path(arguments: dict[str, float], message: str, tiny_architectures: Architectures) -> None:
    with pytest.raises(ValueError, match=message):
        QTViT(tiny_architectures["b"], **arguments)
    last = QTViT(tiny_architectures["b"], drop_path_rate=0.1, drop_path_skip=7)
    assert list(drop_path_rates(last).values()) == pytest.approx([0.1])


def test_drop_path_of_a_model_from_the_meta_device(tiny_architectures: Architectures) -> None:
    with torch.device("meta"):
        model = QTViT(tiny_architectures["b"], drop_path_rate=0.4)
    model.to_empty(device="cpu")
    set_drop_path(model, float("nan"))
    model.init_weights()
    assert list(drop_path_rates(model).values()) == pytest.approx([0.05 * i for i in range(1, 9)])


def test_drop_path_ramp(tiny_architectures: Architectures) -> None:
    model = QTViT(tiny_architectures["b"], drop_path_rate=0.4)
    keys = list(QTViT(tiny_architectures["b"]).state_dict())
    for progress in (0.0, 0.25, 1.0):
        set_drop_path(model, progress)
        assert list(drop_path_rates(model).values()) == pytest.approx([0.05 * i * progress for i in range(1, 9)])
    assert list(model.state_dict()) == keys


def test_a_changing_drop_path_neither_recompiles_nor_starves_a_parameter(
    tiny_architectures: Architectures, randomize: Randomize
) -> None:
    model = randomize(QTViT(tiny_architectures["nano"], num_classes=10, drop_path_rate=0.3), 0).train()
    plain = randomize(QTViT(tiny_architectures["nano"], num_classes=10), 0).train()
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = image(16, 16, batch=8)
    for progress in (0.0, 0.5, 1.0):
        set_drop_path(model, progress)
        logits = compiled(x)
        logits.logsumexp(1).mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert torch.allclose(logits, plain(x), atol=1e-4) == (progress == 0)
        model.zero_grad()
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("img_size", "maps"),
    [(None, [(14, 14), (7, 7), (7, 7)]), (96, [(6, 6), (3, 3), (3, 3)]), ((100, 72), [(7, 5), (4, 3), (4, 3)])],
)
def test_img_size_lays_out_the_positional_maps(
    img_size: int | tuple[int, int] | None, maps: list[tuple[int, int]], tiny_architectures: Architectures
) -> None:
    model = QTViT(tiny_architectures["b"], img_size=img_size)
    assert [tuple(p.shape[-2:]) for name, p in model.named_parameters() if name.endswith("pos_embed")] == maps
