"""Multi-scale attention against the released layer, and on shapes and precisions that one never took."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qtvit.layers import MultiScaleAttention
from qtvit.models.released import _ATTENTION_NAMES
from qtvit.ops import reference_attention

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
    q: Tensor, k: Tensor, v: Tensor, kernel: str, scalars: nn.ParameterDict | dict[str, Tensor]
) -> Tensor:
    """`linear_attention_cf` by way of N x N weights in float64."""
    wide = {name: scalar.double() for name, scalar in scalars.items()}
    return reference_attention(q.mT.double(), k.mT.double(), v.mT.double(), kernel, **wide).mT.to(v.dtype)


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
@pytest.mark.parametrize("kernel", ["taylor2", "taylor2_paper"])
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
