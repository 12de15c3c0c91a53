"""Entropy and effective support, by hand and in bounded memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from qtvit.explain import entropy, look, sharpness
from qtvit.models import QTViT
from qtvit.ops import KERNELS


def test_sharpness_by_hand() -> None:
    rows = torch.tensor([[0.25] * 4, [0, 1, 0, 0], [0.5, 0.5, 0, 0], [-0.5, 0.5, 0, 0], [0.5, 0.25, 0.125, 0.125]])
    relative, support = sharpness(rows)
    assert relative.tolist() == pytest.approx([1, 0, 0.5, 0.5, 0.875])
    assert support.tolist() == pytest.approx([1, 0.25, 0.5, 0.5, 2**1.75 / 4])
    assert torch.equal(sharpness(7 * rows)[1], support)


def test_sharpness_of_one_token_and_of_no_weights() -> None:
    assert [x.tolist() for x in sharpness(torch.tensor([[0.3]]))] == [[1], [1]]
    assert all(x.isnan().all() for x in sharpness(torch.zeros(1, 4)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_focus_is_the_mean_over_all_queries_and_heads(
    kernel: str, network: Callable[..., QTViT], picture: Image.Image
) -> None:
    view = look(network(kernel=kernel), picture)
    if kernel == "relu":  # of half the map, some queries then have no weights
        view.inputs["stages.2.1.attn"][..., 5:] = 0
    rows = view.focus()
    assert [(row.layer, row.kernel, row.map_size) for row in rows] == [
        ("stages.1.1.attn", kernel, (8, 20)),
        ("stages.2.1.attn", kernel, (4, 10)),
    ]
    centres = [(10 * x + 0.75, 10 * y + 0.75) for y in range(4) for x in range(10)]
    weights = view.attention(centres).weights.flatten(2).abs().double()  # every query
    shares = weights / weights.sum(-1, keepdim=True)
    assert bool(shares.isnan().any()) == (kernel == "relu")
    nats = -(shares * shares.clamp_min(1e-300).log()).sum(-1)
    assert rows[1].entropy == pytest.approx(float(nats.nanmean()) / math.log(40), rel=1e-5)
    assert rows[1].support == pytest.approx(float(nats.exp().nanmean()) / 40, rel=1e-5)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    num_items = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.num_items = max(self.num_items, tensor.numel())
        return out


def test_memory_is_bounded(
    network: Callable[..., QTViT], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = look(network(), picture, 32)
    height, width = view.inputs["stages.1.1.attn"].shape[-2:]
    assert (height, width) == (16, 40)
    want = view.focus()
    monkeypatch.setattr(entropy, "MAX_WEIGHTS", 2**16)
    with Largest() as largest:
        chunked = view.focus()
    assert largest.num_items <= 2**16 < (height * width) ** 2 / 6
    for row, expected in zip(chunked, want, strict=True):
        assert (row.entropy, row.support) == pytest.approx((expected.entropy, expected.support), rel=1e-6)
    monkeypatch.setattr(entropy, "MAX_WEIGHTS", 1)
    assert look(network(), picture).focus()[1].entropy < 1
