"""The reductions of Table 3, written out pair by pair."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

from qtvit.ablation.table3 import TABLE3_KERNELS, drawn_terms, table3_kernels
from qtvit.models import build_model, model_cost
from qtvit.ops import KERNELS, linear_attention

SHAPE = (2, 3, 35, 16)


def full(x: Tensor) -> list[Tensor]:
    return [x[..., i] * x[..., j] for i in range(16) for j in range(16)]


def pool(size: int) -> Callable[[Tensor], list[Tensor]]:
    def terms(x: Tensor) -> list[Tensor]:
        means = [x[..., i : i + size].mean(-1) for i in range(0, 16, size)]
        return [a * b for a in means for b in means]

    return terms


def chunk(num: int) -> Callable[[Tensor], list[Tensor]]:
    def terms(x: Tensor) -> list[Tensor]:
        parts = [range(start, start + 16 // num) for start in range(0, 16, 16 // num)]
        return [x[..., i] * x[..., j] for part in parts for i in part for j in part]

    return terms


def drawn(x: Tensor) -> list[Tensor]:
    return [x[..., i] * x[..., j] for i, j in zip(*drawn_terms(16), strict=True)]


TERMS = {
    "full": full,
    "pool2": pool(2),
    "pool4": pool(4),
    "chunk2": chunk(2),
    "chunk4": chunk(4),
    "chunk8": chunk(8),
    "random": drawn,
}
NUM_TERMS = {"full": 256, "pool2": 64, "pool4": 16, "chunk2": 128, "chunk4": 64, "chunk8": 32, "random": 16}
MACS = {
    "full": 0.65,
    "pool2": 0.55,
    "pool4": 0.52,
    "chunk2": 0.58,
    "chunk4": 0.55,
    "chunk8": 0.53,
    "random": 0.52,
    "self": 0.52,
}
"""Of the paper's table, in G."""


def weights(name: str, q: Tensor, k: Tensor, c: Tensor) -> Tensor:
    """The N x M weights of Table 3's kernel ``name``."""
    g_q, g_k = (torch.stack(TERMS[name](x), -1) for x in (q, k))
    cosines = (g_q @ g_k.mT) / (g_q.norm(dim=-1)[..., None] * g_k.norm(dim=-1)[..., None, :])
    return cosines + c**2 + (name == "random")


@pytest.mark.parametrize("name", TERMS)
def test_outputs_gradients_and_signs(name: str) -> None:
    q, k, v = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3))
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    w = weights(name, q, k, c)
    assert torch.stack(TERMS[name](q), -1).shape[-1] == NUM_TERMS[name]
    assert w.min() >= 0.7**2
    want = w / w.sum(-1, keepdim=True) @ v
    with table3_kernels():
        out = linear_attention(q, k, v, f"table3_{name}", {"c": c})
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, (q, k, v, c), grad) for o in (out, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1e4])
def test_tokens_of_any_length(name: str, magnitude: float) -> None:
    q, k, v = ((torch.randn(SHAPE) * magnitude).half().requires_grad_() for _ in range(3))
    with table3_kernels():
        out = linear_attention(q, k, v, f"table3_{name}")
    out.sum().backward()
    assert out.abs().max() <= v.abs().max() * 1.001
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(("name", "macs"), MACS.items())
def test_macs_are_those_of_the_paper(name: str, macs: float) -> None:
    """On qtvit_1 at 224 px; the positional map has no part in them, but takes long to trace."""
    with table3_kernels(), torch.device("meta"):
        model = build_model("qtvit_1", kernel="taylor2" if name == "self" else f"table3_{name}", ape=False)
        assert model_cost(model, (224, 224)).num_macs / 1e9 == pytest.approx(macs, abs=0.01)


def test_the_terms_drawn_stay_the_same() -> None:
    rows, columns = drawn_terms(4)
    assert list(zip(rows, columns, strict=True)) == [(0, 0), (1, 2), (3, 0), (3, 3)]
    assert len(set(zip(*drawn_terms(32), strict=True))) == 32


def test_the_kernels_are_there_within_their_context_only() -> None:
    before = dict(KERNELS)
    with table3_kernels(), table3_kernels():
        assert timm.create_model("qtvit_nano", kernel="table3_pool2").kernel == "table3_pool2"
    assert before == KERNELS
    assert not before.keys() & TABLE3_KERNELS.keys()
    with pytest.raises(ValueError, match=r"'table3_pool2' .* within qtvit\.ablation\.table3\.table3_kernels\(\)"):
        build_model("qtvit_nano", kernel="table3_pool2")
