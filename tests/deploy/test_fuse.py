"""The fused copy of a network."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import qtvit.models  # noqa: F401
from qtvit.deploy import fuse
from qtvit.deploy.fuse import GroupedPointwise, Pointwise
from qtvit.layers import MultiScaleAttention

Make = Callable[..., nn.Module]


@pytest.fixture
def make(randomize: Callable[[nn.Module, int], nn.Module]) -> Make:
    """Models in evaluation mode with random BatchNorm statistics and maps."""
    return lambda name, **args: randomize(timm.create_model(name, **args), 0).eval()


@pytest.mark.parametrize("name", ["qtvit_nano", "qtvit_0"])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (97, 65)])
@torch.no_grad()
def test_outputs_are_the_same_and_no_norm_is_left(make: Make, name: str, size: tuple[int, int]) -> None:
    model = make(name, num_classes=7)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = torch.randn(2, 3, *size)
    want = model(pixels)
    for fused in (fuse(model), fuse(model, size), fuse(model, size, eager_cpu=True)):
        torch.testing.assert_close(fused(pixels), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
        assert not any(p.requires_grad for p in fused.parameters())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
@torch.no_grad()
def test_matrix_products_are_the_convolutions(size: tuple[int, int], memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 8, *size).contiguous(memory_format=memory_format)
    for conv, product in (
        (nn.Conv2d(8, 6, 1), Pointwise),
        (nn.Conv2d(8, 6, 1, bias=False), Pointwise),
        (nn.Conv2d(8, 8, 1, groups=4, bias=False), GroupedPointwise),
    ):
        out = product(conv)(x)
        torch.testing.assert_close(out, conv(x), rtol=1e-5, atol=1e-6)
        if product is Pointwise:
            assert out.is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_the_fast_form_leaves_its_input_alone_in_any_memory_format(make: Make) -> None:
    model = make("qtvit_nano")
    fused = fuse(model, eager_cpu=True)
    pixels = torch.randn(2, 3, 33, 47)
    want = model(pixels)
    for x in (pixels, pixels.to(memory_format=torch.channels_last)):
        before = x.clone()
        torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert torch.equal(x, before)
    again = fuse(fused, eager_cpu=True)
    assert torch.equal(again(pixels), fused(pixels))


@pytest.mark.parametrize("name", ["qtvit_nano", "qtvit_0"])
def test_it_runs_without_no_grad(make: Make, name: str) -> None:
    fused = fuse(make(name), (64, 64))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = fused(pixels)
    torch.testing.assert_close(fused(pixels), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_maps_are_laid_out_for_the_image(make: Make) -> None:
    fused = fuse(make("qtvit_0"), (64, 96))
    layers = [module for module in fused.modules() if isinstance(module, MultiScaleAttention)]
    assert {tuple(layer.pos_embed.shape[-2:]) for layer in layers} == {(4, 6), (2, 3)}


@pytest.mark.parametrize("kernel", ["relu", "taylor2_paper", "softmax"])
@torch.no_grad()
def test_any_kernel_and_no_shortcut_or_position(make: Make, kernel: str) -> None:
    """In fp64, as softmax over weights of these sizes makes much of rounding."""
    model = make("qtvit_nano", kernel=kernel, shortcut=False, ape=False).double()
    pixels = torch.randn(1, 3, 33, 47, dtype=torch.float64)
    torch.testing.assert_close(fuse(model, (33, 47))(pixels), model(pixels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_halves_of_extreme_activations_stay_finite(make: Make, dtype: torch.dtype) -> None:
    """Queries, keys and values beyond 1e4: their squares, and sums over tokens, are beyond what fp16 holds."""
    model = make("qtvit_nano")
    layer = model.stages[1][1].attn
    layer.qkv.weight.mul_(2_000)
    layer.shortcut_norm.running_var.mul_(2_000**2)
    layer.proj.norm.running_var.mul_(2_000**2)
    x = torch.randn(4, layer.qkv.in_channels, 40, 40)
    want = fuse(model).stages[1][1].attn(x)
    half = fuse(model).to(dtype).stages[1][1].attn
    largest: list[float] = []
    half.aggregate.register_forward_hook(lambda module, inputs, output: largest.append(float(output.abs().max())))
    got = half(x.to(dtype)).float()
    assert 1e4 < largest[0] < 65504
    assert got.isfinite().all()
    assert (got - want).norm() / want.norm() < 0.02


def test_a_model_of_others_is_copied() -> None:
    model = timm.create_model("efficientvit_b0", num_classes=3).eval()
    fused = fuse(model, (64, 64))
    pixels = torch.randn(1, 3, 64, 64)
    assert fused is not model
    torch.testing.assert_close(fused(pixels), model(pixels))


def test_impossible_size() -> None:
    with pytest.raises(ValueError, match="1 x 1 or more, got 0 x 32"):
        fuse(timm.create_model("qtvit_nano"), (0, 32))
