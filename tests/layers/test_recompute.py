"""Computing activations again changes how much is kept for the backward pass, and nothing else."""

import copy
import gc
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from qtvit.bench.train import bytes_kept
from qtvit.layers import (
    ConvNormAct,
    ConvPair,
    DSConv,
    FusedMBConv,
    MBConv,
    MultiScaleAttention,
    recompute,
    recompute_activations,
)
from qtvit.models import Architecture, QTViT

BLOCKS = {
    "stem": lambda act: ConvNormAct(6, 6, 3, act=act),
    "ds": lambda act: DSConv(6, 6, norm_eps=1e-5, act=act),
    "pair": lambda act: ConvPair(6, 6, norm_eps=1e-5, act=act),
    "mb": lambda act: MBConv(6, 6, norm_eps=1e-5, act=act),
    "mb, fewer norm": lambda act: MBConv(6, 6, fewer_norm=True, norm_eps=1e-5, act=act),
    "fused": lambda act: FusedMBConv(6, 6, norm_eps=1e-5, act=act),
    "attention": lambda act: MultiScaleAttention(6, head_dim=3, map_size=(5, 4)),
}


def results(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, gradients and statistics of one training step."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = module(x)
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    return [out, *gradients, *module.buffers()]


def recomputing(module: nn.Module) -> nn.Module:
    """A copy that computes its activations again."""
    again = copy.deepcopy(module)
    recompute_activations(again)
    return again


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["hard_swish", "gelu_tanh"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_training_step_is_the_same_to_the_bit(
    block: str, act: str, dtype: torch.dtype | None, randomize: Callable[..., nn.Module]
) -> None:
    x = torch.randn(3, 6, 9, 7)
    plain = randomize(BLOCKS[block](act), 0).train()
    again = recomputing(plain)
    for got, want in zip(results(again, x, dtype), results(plain, x, dtype), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("block", "maps"),
    [("stem", 1), ("ds", 2), ("pair", 2), ("mb", 9), ("mb, fewer norm", 9), ("fused", 5), ("attention", 10)],
)
def test_the_outputs_of_the_convolutions_are_all_that_is_kept(block: str, maps: int) -> None:
    """In units of the input map, which is kept as well."""
    module = BLOCKS[block]("hard_swish").train()
    x = torch.randn(3, 6, 32, 32, requires_grad=True)
    plain = bytes_kept(lambda: module(x), module) / (x.numel() * 4)
    again = recomputing(module)
    kept = bytes_kept(lambda: again(x), again) / (x.numel() * 4)
    assert kept == pytest.approx(1 + maps, rel=0.01)
    assert plain > kept + 0.9


def test_the_network_keeps_less_than_six_tenths(tiny_architectures: Mapping[str, Architecture]) -> None:
    for cfg in tiny_architectures.values():
        model = QTViT(cfg, num_classes=10).train()
        again = recomputing(model)
        x = torch.randn(2, 3, 64, 64)
        kept = bytes_kept(lambda again=again, x=x: again(x), again)
        assert kept < 0.6 * bytes_kept(lambda model=model, x=x: model(x), model)


def test_the_network_is_the_same_besides(tiny_architectures: Mapping[str, Architecture]) -> None:
    """State dict, types, and what goes through pickle and copies, whose blocks are their own."""
    model = QTViT(tiny_architectures["b"], num_classes=10).train()
    again = pickle.loads(pickle.dumps(recomputing(model)))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    copied = copy.deepcopy(again)
    nn.init.zeros_(copied.stages[1][0].inverted_conv.conv.weight)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert not torch.equal(copied(x), model(x))


@torch.no_grad()
def test_evaluation_is_the_same(randomize: Callable[..., nn.Module]) -> None:
    module = randomize(BLOCKS["mb"]("hard_swish"), 0).eval()
    x = torch.randn(3, 6, 9, 7)
    assert torch.equal(recomputing(module)(x), module(x))


def test_frozen_and_untracked_norms_are_left_alone(randomize: Callable[..., nn.Module]) -> None:
    plain = randomize(BLOCKS["mb"]("hard_swish"), 0).train()
    plain.inverted_conv.norm.eval()
    plain.depth_conv.norm.momentum = None  # an average of all batches
    plain.point_conv.norm = nn.BatchNorm2d(6, track_running_stats=False)
    again = recomputing(plain)
    for x in torch.randn(3, 2, 6, 4, 4):
        for got, want in zip(results(again, x), results(plain, x), strict=True):
            assert torch.equal(got, want)


def test_a_checkpoint_keeps_its_input_alone(randomize: Callable[..., nn.Module]) -> None:
    plain = randomize(nn.Sequential(*(BLOCKS[name]("gelu_tanh") for name in BLOCKS)).train(), 0)
    x = torch.randn(3, 6, 16, 16, requires_grad=True)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = copy.deepcopy(plain)

        def forward(self, x: Tensor) -> Tensor:
            return recompute(self.module, x)

    measured = copy.deepcopy(plain)
    assert bytes_kept(lambda: recompute(measured, x), measured) == x.numel() * 4
    for got, want in zip(results(Whole(), x.detach()), results(plain, x.detach()), strict=True):
        assert torch.equal(got, want)


def test_nothing_is_kept_alive_after_the_backward_pass() -> None:
    module = recomputing(BLOCKS["mb"]("hard_swish").train())
    module(torch.randn(2, 6, 4, 4)).sum().backward()
    module.zero_grad()
    gc.collect()
    before = sum(type(o) is Tensor for o in gc.get_objects())
    for _ in range(3):
        module(torch.randn(2, 6, 4, 4)).sum().backward()
    module.zero_grad()
    gc.collect()
    assert sum(type(o) is Tensor for o in gc.get_objects()) == before
