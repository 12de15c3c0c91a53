"""Stochastic depth whose probability is a tensor."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qtvit.layers import DropPath, recompute, set_drop_path


@pytest.mark.parametrize(("rate", "progress"), [(0.25, 1.0), (0.8, 0.5), (0.05, 1.0), (0.0, 1.0)])
def test_a_sample_is_dropped_or_scaled_as_a_whole(rate: float, progress: float) -> None:
    drop = DropPath(rate)
    set_drop_path(drop, progress)
    x = torch.ones(20_000, 2, 1, 3)
    out = drop(x)
    assert (out == out[:, :1, :1, :1]).all()
    prob = rate * progress
    kept = out[:, 0, 0, 0] > 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - prob))
    error = (prob * (1 - prob) / len(x)) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - prob, abs=4 * error)
    assert not out[~kept].any()


def test_nothing_is_dropped_in_evaluation_or_without_progress() -> None:
    drop, x = DropPath(0.9), torch.randn(64, 2, 3, 3)
    assert drop.eval()(x) is x
    set_drop_path(drop.train(), 0.0)
    assert torch.equal(drop(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["input", "module", "autocast"])
def test_the_dtype_stays(dtype: torch.dtype, how: str) -> None:
    drop = DropPath(0.5)
    if how == "module":
        drop = drop.to(dtype)
    x = torch.ones(64, 1, 2, 2, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = drop(x)
    assert out.dtype == dtype
    assert out.unique().tolist() == [0, 2]
    out.sum().backward()
    assert torch.equal(x.grad, out)


def test_memory_format_stays() -> None:
    x = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    assert DropPath(0.5)(x).is_contiguous(memory_format=torch.channels_last)


def test_the_progress_is_a_part_of_each_rate() -> None:
    model = nn.Sequential(DropPath(0.2), nn.Sequential(DropPath(0.4), nn.Identity()))
    prob = model[0].drop_prob
    set_drop_path(model, 0.5)
    assert prob is model[0].drop_prob  # in place, so that a compiled graph sees it
    assert [model[0].drop_prob.item(), model[1][0].drop_prob.item()] == pytest.approx([0.1, 0.2])
    other = copy.deepcopy(model)
    set_drop_path(model, 1.0)
    assert [model[0].drop_prob.item(), model[1][0].drop_prob.item()] == pytest.approx([0.2, 0.4])
    assert [other[0].drop_prob.item(), other[1][0].drop_prob.item()] == pytest.approx([0.1, 0.2])
    assert (prob.dtype, list(model.state_dict())) == (torch.float32, [])


def test_recomputation_drops_the_same_samples() -> None:
    seen: list[Tensor] = []

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)
            self.drop = DropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.drop(self.conv(x)).tanh())
            return seen[-1].square()

    recompute(Branch(), torch.randn(64, 1, 2, 2)).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert 0 < seen[0].count_nonzero() < seen[0].numel()


def test_evaluation_traces_and_exports() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), DropPath(0.5)).eval()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    assert not any("rand" in str(node.target) for node in exported.graph.nodes)
    assert torch.fx.symbolic_trace(model.train())(x).shape == x.shape
