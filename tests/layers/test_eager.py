"""The short cuts of eager inference against the modules called one by one."""

import pytest
import torch
from torch import nn

from qtvit.layers import ConvNormAct, MultiScaleAttention
from qtvit.layers.eager import is_eager_inference

FORMATS = [torch.contiguous_format, torch.channels_last]


def randomize_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "args",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "act": "hard_swish"},
        {"kernel_size": 1, "norm_eps": None, "act": "gelu_tanh"},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2, "act": "hard_swish"},
        {"kernel_size": 3, "groups": 8},
    ],
    ids=str,
)
def test_conv_norm_act(args: dict[str, object], batch: int, memory_format: torch.memory_format) -> None:
    layer = ConvNormAct(8, 16, **args).eval()
    randomize_norms(layer)
    x = torch.randn(batch, 8, 7, 5).contiguous(memory_format=memory_format)
    before = x.clone()
    want = layer(x)
    with torch.no_grad():
        assert is_eager_inference(x, *layer)
        got = layer(x)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention(batch: int, memory_format: torch.memory_format) -> None:
    layer = MultiScaleAttention(16, head_dim=8, map_size=(4, 4)).eval()
    randomize_norms(layer)
    x = torch.randn(batch, 16, 5, 6).contiguous(memory_format=memory_format)
    want = layer(x)
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_hooks_hear_of_every_module() -> None:
    layer = ConvNormAct(8, 16, 1, act="hard_swish").eval()
    heard: list[nn.Module] = []
    for module in layer:
        module.register_forward_hook(lambda module, *_: heard.append(module))
    layer(torch.randn(1, 8, 4, 4))
    assert heard == list(layer)


@torch.no_grad()
def test_norm_in_training_mode_counts_the_batch() -> None:
    layer = ConvNormAct(8, 16, 1)
    layer(torch.randn(4, 8, 4, 4) + 1)
    assert layer.norm.num_batches_tracked == 1
    assert layer.norm.running_mean.abs().sum() > 0


def test_not_where_gradients_or_autocast_are_wanted() -> None:
    x = torch.randn(1, 8, 4, 4)
    assert not is_eager_inference(x)
    with torch.no_grad():
        assert is_eager_inference(x)
        assert not is_eager_inference(x.half())
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_eager_inference(x)
