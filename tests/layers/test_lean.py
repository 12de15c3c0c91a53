"""Forgetting and recomputing changes how much is kept for the backward pass, and nothing else."""

import gc
import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
    lean,
    set_recompute_activations,
)
from qtvit.models import Architecture, QTViT

BLOCKS = {
    "stem": lambda act: ConvNormAct(6, 6, 3, act=act),
    "ds": lambda act: DSConv(6, 6, norm_eps=1e-5, act=act),
    "pair": lambda act: ConvPair(6, 6, norm_eps=1e-5, act=act),
    "mb": lambda act: MBConv(6, 6, norm_eps=1e-5, act=act),
    "mb, fewer norm": lambda act: MBConv(6, 6, fewer_norm=True, norm_eps=1e-5, act=act),
    "fused": lambda act: FusedMBConv(6, 6, norm_eps=1e-5, act=act),
}


def results(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, gradients and statistics of one training step."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = module(x)
    gradients = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    return [out, *gradients, *module.buffers()]


class Checkpointed(nn.Module):
    """A module that is recomputed in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return lean.recompute(self.module, x)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns the lean paths off."""

    def turn_off() -> None:
        for where in ("lean", "conv"):
            monkeypatch.setattr(f"qtvit.layers.{where}.is_lean", lambda *_: False)

    return turn_off


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["hard_swish", "gelu_tanh"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_training_step_is_the_same(
    block: str, act: str, dtype: torch.dtype | None, randomize: Callable[..., nn.Module], plain: Callable[[], None]
) -> None:
    x = torch.randn(3, 6, 9, 7)
    modules = [randomize(BLOCKS[block](act), 0).train() for _ in range(2)]
    ours = results(modules[0], x, dtype)
    plain()
    tolerance = 1e-5 if dtype is None else 4 * torch.finfo(dtype).eps
    for got, want in zip(ours, results(modules[1], x, dtype), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().float().abs().max()))


@pytest.mark.parametrize("block", [*BLOCKS, "attention"])
def test_it_can_be_turned_off(block: str, plain: Callable[[], None]) -> None:
    if block == "attention":
        module: nn.Module = MultiScaleAttention(6, head_dim=3, map_size=(32, 32)).train()
    else:
        module = BLOCKS[block]("hard_swish").train()
    x = torch.randn(3, 6, 32, 32, requires_grad=True)
    set_recompute_activations(module, False)
    kept = bytes_kept(lambda: module(x), module)
    set_recompute_activations(module, True)
    assert bytes_kept(lambda: module(x), module) < kept
    plain()
    assert bytes_kept(lambda: module(x), module) == kept


@pytest.mark.parametrize(
    ("block", "maps"), [("stem", 1), ("ds", 2), ("pair", 2), ("mb", 9), ("mb, fewer norm", 9), ("fused", 5)]
)
def test_the_outputs_of_the_convolutions_are_all_that_is_kept(block: str, maps: int, plain: Callable[[], None]) -> None:
    """In units of the input map, which is kept as well."""
    module = BLOCKS[block]("hard_swish").train()
    x = torch.randn(3, 6, 32, 32, requires_grad=True)
    kept = bytes_kept(lambda: module(x), module) / (x.numel() * 4)
    assert kept == pytest.approx(1 + maps, rel=0.01)
    plain()
    assert bytes_kept(lambda: module(x), module) / (x.numel() * 4) > kept + 0.9


def test_the_network_keeps_less_than_seven_tenths(
    tiny_architectures: Mapping[str, Architecture], plain: Callable[[], None]
) -> None:
    for cfg in tiny_architectures.values():
        model = QTViT(cfg, num_classes=10).train()
        x = torch.randn(2, 3, 64, 64)
        kept = bytes_kept(lambda model=model, x=x: model(x), model)
        with pytest.MonkeyPatch.context() as patch:
            for where in ("lean", "conv"):
                patch.setattr(f"qtvit.layers.{where}.is_lean", lambda *_: False)
            assert kept < 0.7 * bytes_kept(lambda model=model, x=x: model(x), model)


def test_an_enclosing_checkpoint_keeps_its_input_alone(randomize: Callable[..., nn.Module]) -> None:
    modules = [nn.Sequential(*(BLOCKS[name]("gelu_tanh") for name in BLOCKS)).train() for _ in range(3)]
    plain, checkpointed, measured = (randomize(module, 0) for module in modules)
    x = torch.randn(3, 6, 16, 16, requires_grad=True)
    assert bytes_kept(lambda: lean.recompute(measured, x), measured) == x.numel() * 4
    whole = Checkpointed(checkpointed)
    for got, want in zip(results(whole, x.detach()), results(plain, x.detach()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


@pytest.mark.parametrize("block", ["mb", "mb, fewer norm"])
def test_second_derivatives(block: str) -> None:
    module = BLOCKS[block]("gelu_tanh").double().train()
    x = torch.randn(2, 6, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[:, :2], x)


def test_the_graph_can_be_used_twice() -> None:
    module = BLOCKS["mb"]("hard_swish").train()
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    loss = module(x).square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_kept_alive_after_the_backward_pass() -> None:
    module = BLOCKS["mb"]("hard_swish").train()
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Tensor for o in gc.get_objects())
        for _ in range(3):
            module(torch.randn(2, 6, 4, 4)).sum().backward()
        module.zero_grad()
        assert sum(type(o) is Tensor for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_momentum_none_averages_and_no_statistics_are_fine(plain: Callable[[], None]) -> None:
    modules = [BLOCKS["stem"]("hard_swish").train() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        module.norm.momentum = None
    batches = torch.randn(3, 2, 6, 4, 4)
    for x in batches:
        modules[0](x)
    untracked = ConvNormAct(6, 6, 1, act="hard_swish").train()
    untracked.norm = nn.BatchNorm2d(6, track_running_stats=False)
    untracked(batches[0]).sum().backward()
    plain()
    for x in batches:
        modules[1](x)
    for got, want in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_torch_that_refuses_an_eps_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch 2.11 does, even where statistics are given."""
    batch_norm = nn.functional.batch_norm

    def strict(*args: Any, **kwargs: Any) -> Tensor:
        assert inspect.signature(batch_norm).bind(*args, **kwargs).arguments.get("eps", 1) > 0
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "batch_norm", strict)
    results(BLOCKS["mb"]("hard_swish").train(), torch.randn(2, 6, 4, 4))


def test_where_it_is_not_lean() -> None:
    x, norm = torch.zeros(1), nn.BatchNorm2d(1).train()
    assert lean.is_lean(x)
    assert lean.is_lean(x, norm)
    assert not lean.is_lean(x, norm, nn.BatchNorm2d(1).eval())
    assert not lean.is_lean(x, nn.SyncBatchNorm(1).train())
    assert not lean.is_lean(torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {})), norm)
    with torch.no_grad():
        assert not lean.is_lean(x, norm)


def test_function_transforms_work_in_training(randomize: Callable[..., nn.Module]) -> None:
    module = randomize(BLOCKS["mb"]("hard_swish"), 0).train()
    parameters = dict(module.named_parameters())
    x = torch.randn(2, 6, 4, 4)

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, {**parameters, **buffers}, x).square().sum()

    ours = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    module(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-4)
