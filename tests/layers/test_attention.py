"""Multi-scale attention against the released layer, and on shapes and precisions that one never took."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention
from torch import Tensor, nn

from qtvit.layers import LinearAttention, MultiScaleAttention
from qtvit.models.foreign import _ATTENTION_NAMES
from qtvit.ops import KERNELS, attention_weights, masked_softmax_attention_cf, reference_attention

GOLDEN = Path(__file__).parents[1] / "golden"
MAP_SIZE = (14, 14)


def released_name(name: str) -> str:
    ours = next(prefix for prefix in _ATTENTION_NAMES if name.startswith(prefix))
    return name.replace(ours, _ATTENTION_NAMES[ours], 1)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "attention.safetensors")


@pytest.fixture
def layer(golden: dict[str, Tensor]) -> MultiScaleAttention:
    layer = MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE)
    assert sum(key.startswith("weights/") for key in golden) == len(layer.state_dict())
    layer.load_state_dict({name: golden["weights/" + released_name(name)] for name in layer.state_dict()})
    return layer.eval()


def slow_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, scalars: dict[str, Tensor], eps: float | None = None
) -> Tensor:
    """`linear_attention_cf` by way of N x N weights in float64."""
    wide = {name: scalar.double() for name, scalar in scalars.items()}
    return reference_attention(q.mT.double(), k.mT.double(), v.mT.double(), kernel, eps, **wide).mT.to(v.dtype)


def test_matches_the_release(layer: MultiScaleAttention, golden: dict[str, Tensor]) -> None:
    core = []
    layer.proj.register_forward_pre_hook(lambda _, args: core.append(args[0]))
    with torch.no_grad():
        q, k, v = layer.multi_scale_qkv(golden["input"])
        output = layer(golden["input"])
    # Per head: q, then k, then v.
    qkv = torch.stack([q, k, v], 2).flatten(1, 3).unflatten(-1, MAP_SIZE)
    for ours, name in ((qkv, "multi_scale_qkv"), (core[0], "core_output"), (output, "output")):
        torch.testing.assert_close(ours, golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_position_is_the_parameter_at_its_own_size(dtype: torch.dtype) -> None:
    layer = MultiScaleAttention(16, head_dim=8, map_size=(5, 9)).to(dtype)
    nn.init.normal_(layer.pos_embed)
    position = layer.position(torch.Size((5, 9)))
    assert position.shape == (1, 4, 8, 45)
    # Head-major, then channels of the head, then rows, then columns.
    assert torch.equal(position, layer.pos_embed.reshape(1, 4, 8, 45))


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (28, 14), (1, 20)])
def test_position_keeps_rows_and_columns_apart(layer: MultiScaleAttention, size: tuple[int, int]) -> None:
    rows = torch.linspace(-1, 1, MAP_SIZE[0]).view(1, 1, -1, 1)
    with torch.no_grad():
        layer.pos_embed.copy_(rows.expand_as(layer.pos_embed))
    resized = layer.position(torch.Size(size)).unflatten(-1, size)
    torch.testing.assert_close(resized, resized[..., :1].expand_as(resized))
    assert (resized[..., 1:, :] > resized[..., :-1, :]).all()
    edges = nn.functional.interpolate(layer.pos_embed, size=size, mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(resized.flatten(1, 2), edges, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (7, 13), (13, 7), (17, 13), (20, 33)])
@pytest.mark.parametrize("kernel", ["taylor2", "taylor2_paper", "softmax"])
def test_any_rectangle(
    size: tuple[int, int], kernel: str, randomize: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = randomize(MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE, kernel=kernel), 1).eval()
    x = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaves = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out.square().mean(), leaves)]

    fast = run()
    assert fast[0].shape == x.shape
    monkeypatch.setattr("qtvit.layers.attention.linear_attention_cf", slow_attention)
    for ours, reference in zip(fast, run(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=2e-5 * reference.abs().max().item() + 1e-4)


def test_heads_stay_apart(layer: MultiScaleAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole layer by plain loops: position on the keys alone, one head after another, tokens in row order."""
    height, width, dim = 6, 11, 8
    x = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))
    position = nn.functional.interpolate(layer.pos_embed, (height, width), mode="bicubic", align_corners=False)[0]
    with torch.no_grad():
        qkv = layer.qkv(x)
        channels = torch.cat([qkv, layer.aggregate(qkv)], 1)[0].flatten(1)
        heads = []
        for head in range(4):
            q, k, v = (channels[(3 * head + i) * dim : (3 * head + i + 1) * dim].T.double() for i in range(3))
            k = k + position[head * dim : (head + 1) * dim].flatten(1).T
            norm = layer.shortcut_norm
            normed = (v - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            attended = reference_attention(q[None, None], k[None, None], v[None, None], c=layer.scalars["c"].double())
            heads.append(attended[0, 0] + nn.functional.gelu(normed))
        want = layer.proj(torch.cat(heads, -1).T.reshape(1, 32, height, width).float())
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_shortcut_statistics_are_per_channel_of_a_head(randomize: Callable[..., nn.Module]) -> None:
    layer = randomize(MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE), 2).train()
    v = torch.randn(3, 4, 8, 30, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)[:, None]
    norm = layer.shortcut_norm
    layer.shortcut_norm.reset_running_stats()
    out = layer.shortcut(v)
    mean, var = v.mean((0, 1, 3)), v.var((0, 1, 3), correction=0)
    normed = (v - mean[:, None]) / (var[:, None] + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(out, nn.functional.gelu(normed), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["module", "autocast"])
def test_half_precision(layer: MultiScaleAttention, golden: dict[str, Tensor], dtype: torch.dtype, how: str) -> None:
    x, want = golden["input"], golden["output"]
    if how == "module":
        layer, x = layer.to(dtype), x.to(dtype)
    autocast = torch.autocast("cpu", dtype, enabled=how == "autocast")
    with torch.no_grad(), autocast:
        out = layer(x)
    assert out.dtype == dtype
    assert (out.float() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()

    x = x[..., 3:12, :].detach().requires_grad_()
    with autocast:
        out = layer.train()(x)
    out.sum().backward()
    assert x.grad.abs().max() > 0
    for name, leaf in [("input", x), *layer.named_parameters()]:
        assert leaf.grad.isfinite().all(), name


def test_width_has_to_be_a_multiple_of_head_dim() -> None:
    with pytest.raises(ValueError, match=r"width 20 .* not a multiple of head_dim 8"):
        MultiScaleAttention(20, head_dim=8, map_size=MAP_SIZE)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'taylor3'"):
        MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE, kernel="taylor3")


def core_output(layer: MultiScaleAttention, x: Tensor) -> Tensor:
    """What goes into the layer's projection, (B, S·heads·D, H, W)."""
    core = []
    handle = layer.proj.register_forward_pre_hook(lambda _, args: core.append(args[0]))
    with torch.no_grad():
        layer(x)
    handle.remove()
    return core[0]


def test_parts_can_be_switched_off(randomize: Callable[..., nn.Module]) -> None:
    x = torch.randn(2, 16, 6, 9, generator=torch.Generator().manual_seed(0))
    whole = randomize(MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE), 3).eval()
    state = whole.state_dict()
    for part, keys in ({"ape": False}, ["pos_embed"]), ({"shortcut": False}, [k for k in state if "shortcut" in k]):
        layer = MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE, **part).eval()
        assert set(state) - set(layer.state_dict()) == set(keys)
        layer.load_state_dict({key: value for key, value in state.items() if key not in keys})
        with torch.no_grad():
            q, k, v = layer.tokens(x)
        bare = whole.multi_scale_qkv(x)[1] if "ape" in part else whole.tokens(x)[1]
        torch.testing.assert_close(k, bare)
        want = reference_attention(q.mT, k.mT, v.mT, c=state["scalars.c"]).mT
        want = want + whole.shortcut(v) if "ape" in part else want
        torch.testing.assert_close(core_output(layer, x).flatten(2), want.flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_the_softmax_residual_is_there_in_training_alone(randomize: Callable[..., nn.Module]) -> None:
    plain = randomize(MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE), 3)
    layer = MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE, softmax_residual=0.1)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    graphs = [str(torch.export.export(module, (x,)).graph) for module in (layer, plain)]
    assert graphs[0] == graphs[1]

    with torch.no_grad():
        q, k, v = plain.tokens(x)
    residual = masked_softmax_attention_cf(q, k, v, 0.1)
    assert residual.abs().max() > 0.1
    added = core_output(layer.train(), x) - core_output(plain.train(), x)
    torch.testing.assert_close(added.flatten(2), residual.flatten(1, 2), rtol=1e-4, atol=1e-5)
    layer(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.02, True])
def test_impossible_thresholds_of_the_softmax_residual(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"softmax_residual is a threshold between 0 and 1 .*got"):
        MultiScaleAttention(16, head_dim=8, map_size=MAP_SIZE, softmax_residual=threshold)


@pytest.mark.parametrize("norms", [False, True])
def test_linear_attention_takes_the_place_of_timms(norms: bool, randomize: Callable[..., nn.Module]) -> None:
    """With its weights and the softmax kernel, the same output and gradients."""
    options = {"num_heads": 4, "qkv_bias": True, "qk_norm": norms, "scale_norm": norms, "norm_layer": nn.LayerNorm}
    theirs = randomize(Attention(32, **options), 0)
    ours = LinearAttention(32, kernel="softmax", **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_attention_of_a_vision_transformer(kernel: str) -> None:
    model = timm.create_model(
        "deit_tiny_patch16_224",
        img_size=(64, 96),
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=5,
        attn_layer=type("OwnAttention", (LinearAttention,), {"kernel": kernel}),
    )
    logits = model(torch.randn(2, 3, 64, 96))
    logits.square().sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    attn: Any = model.blocks[1].attn
    x = torch.randn(2, 9, 32)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    want = (attention_weights(q, k, kernel, dict(attn.scalars.items())) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(x), attn.proj(want), rtol=1e-4, atol=1e-5)


def test_linear_attention_names_what_it_cannot_do() -> None:
    for arguments, message in [
        ({"dim": 20, "num_heads": 8}, "dim 20 is not a multiple of num_heads 8"),
        ({"dim": 16, "attn_drop": 0.1}, "attn_drop has to be 0, got 0.1"),
        ({"dim": 16, "qk_norm": True}, "qk_norm and scale_norm need a norm_layer"),
        ({"dim": 16, "kernel": "tailor2"}, "unknown kernel 'tailor2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            LinearAttention(**arguments)
    for mask in ({"attn_mask": torch.ones(3, 3)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="takes no mask"):
            LinearAttention(16)(torch.randn(1, 3, 16), **mask)


def test_linear_attention_is_made_where_it_is_asked_for() -> None:
    layer = LinearAttention(16, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert LinearAttention(16).bfloat16()(torch.randn(1, 3, 16).bfloat16()).dtype == torch.bfloat16
