"""The references themselves, against the paper's equations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtvit.ops.reference import (
    exp_taylor2,
    kronecker_features,
    reference_attention,
    symmetric_features,
    taylor2_paper_weights,
)


def test_eq4_is_positive_and_expands_exp() -> None:
    s = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-1, 1, 201)]).double()
    taylor = exp_taylor2(s)
    assert taylor.min() >= 0.5
    torch.testing.assert_close(taylor, 1 + s + s**2 / 2)
    near = s.abs() <= 0.1
    assert ((taylor - s.exp())[near].abs() <= s[near].abs() ** 3 / 5).all()


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 32])
@pytest.mark.parametrize(
    ("features", "num_quadratic"),
    [(kronecker_features, lambda dim: dim * dim), (symmetric_features, lambda dim: dim * (dim + 1) // 2)],
)
def test_features_reproduce_eq4(
    dim: int, features: Callable[[Tensor], Tensor], num_quadratic: Callable[[int], int]
) -> None:
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, 2, 3, 20, dim, generator=generator, dtype=torch.float64)
    f_q, f_k = features(q), features(k)
    torch.testing.assert_close(f_q @ f_k.mT, exp_taylor2(q @ k.mT / dim**0.5), rtol=1e-12, atol=1e-12)
    # Features of degree 2, 1 and 0 grow by 4, 2 and 1 when the token doubles.
    growth = (features(2 * q) / f_q)[0, 0, 0].round().int().tolist()
    assert growth.count(4) == num_quadratic(dim)
    assert growth.count(2) == (2 * dim if features is kronecker_features else dim)
    assert growth.count(1) == 2


def test_eq11_keeps_the_self_terms() -> None:
    """With α² = 1/d, β = γ = 1 what is missing from eq. 4 is the products of different channels, and only that."""
    dim = 8
    q, k = torch.randn(2, 20, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cross = (q @ k.mT).square() - q.square() @ k.square().mT
    compact = taylor2_paper_weights(q, k, alpha=dim**-0.5, beta=1.0, gamma=1.0)
    torch.testing.assert_close(compact + cross / (2 * dim), exp_taylor2(q @ k.mT / dim**0.5))


def test_reference_by_hand() -> None:
    """Two keys, one query: u(q) = (1, 0), u(k) = (1, 0) and (0, 1), so the weights are 1 + c² and c²."""
    q = torch.tensor([[[[3.0, 0.0]]]])
    k = torch.tensor([[[[-2.0, 0.0], [0.0, 5.0]]]])
    v = torch.tensor([[[[10.0], [20.0]]]])
    want = (1.25 * 10 + 0.25 * 20) / 1.5
    torch.testing.assert_close(reference_attention(q, k, v, "taylor2", c=0.5), torch.full((1, 1, 1, 1), want))
