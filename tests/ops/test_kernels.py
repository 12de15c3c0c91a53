"""Properties of the kernels, and inputs that break careless ones."""

import pytest
import torch
from torch import Tensor

from qtvit.ops import KERNELS, attention_weights, linear_attention, reference_attention
from qtvit.ops.kernels import unit_square
from qtvit.ops.reference import REFERENCE_WEIGHTS, taylor2_paper_weights, taylor2_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (2, 3, 17 * 13, 16)


def finite_run(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    """The output, after checking that it and all gradients are finite."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    scalars = {
        name: torch.tensor(value, dtype=q.dtype, requires_grad=True) for name, value in KERNELS[kernel].scalars.items()
    }
    out = linear_attention(q, k, v, kernel, scalars)
    names = ["q", "k", "v", *scalars]
    for name, grad in zip(names, torch.autograd.grad(out.sum(), [q, k, v, *scalars.values()]), strict=True):
        assert grad.isfinite().all(), f"gradient of {name}"
    assert out.isfinite().all()
    return out.detach()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["like q and k", "of order 1"])
@pytest.mark.parametrize("hostile", ["zeros", "constant", "constant 1e4", "1e-6", "1e4", "mixed"])
def test_hostile_inputs(kernel: str, dtype: torch.dtype, values: str, hostile: str) -> None:
    make = {
        "zeros": lambda: torch.zeros(SHAPE),
        "constant": lambda: torch.ones(SHAPE),
        "constant 1e4": lambda: torch.full(SHAPE, 1e4),
        "1e-6": lambda: torch.randn(SHAPE) * 1e-6,
        "1e4": lambda: torch.randn(SHAPE).clamp(-5, 5) * 1e4,
        "mixed": lambda: torch.randn(SHAPE) * 10 ** torch.linspace(-6, 4, SHAPE[-1]),
    }[hostile]
    q, k, v = make(), make(), make() if values == "like q and k" else torch.randn(SHAPE)
    out = finite_run(q.to(dtype), k.to(dtype), v.to(dtype), kernel)
    if KERNELS[kernel].normalized:
        assert out.abs().max() <= v.to(dtype).abs().max() * (1 + 2 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_zero_token_among_normal_ones(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(SHAPE).to(dtype) for _ in range(3))
    for x in (q, k, v):
        x[:, :, 7] = 0
    out = finite_run(q, k, v, kernel)
    want = reference_attention(q.double(), k.double(), v.double(), kernel)
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-11, 1e30])
def test_taylor2_takes_any_fp32_magnitude(magnitude: float) -> None:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    out = finite_run(q * magnitude, k * magnitude, v, "taylor2")
    assert out.abs().max() <= v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 1, 4, 8).to(dtype).requires_grad_() for _ in range(3))
    poison = torch.zeros(1, 1, 4, 8, dtype=dtype)
    poison[0, 0, 2, 3] = torch.nan
    assert linear_attention(q + poison, k, v).isnan().any(-1).flatten().tolist() == [False, False, True, False]
    linear_attention(q, k, v).backward(1 + poison)
    assert q.grad.isnan().any(-1).flatten().tolist() == [False, False, True, False]
    assert k.grad.isnan().all()


def test_fp16_gradient_saturates_and_keeps_its_sign() -> None:
    """At 1e-6 the true gradient, of order 1e6, exceeds what fp16 can hold."""
    q, k, v = (torch.randn(1, 1, 50, 8) for _ in range(3))
    q = (q * 1e-6).half().requires_grad_()
    linear_attention(q, k, v.half()).backward(grad := 1e4 * torch.ones(1, 1, 50, 8).half())
    exact = q.detach().double().requires_grad_()
    reference_attention(exact, k.double(), v.half().double()).backward(grad.double())
    largest = torch.finfo(torch.float16).max
    assert (q.grad.abs() == largest).any()
    torch.testing.assert_close(q.grad.double(), exact.grad.clamp(-largest, largest), rtol=2e-2, atol=50)


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 7.0, 1e4, 1e8])
def test_unit_square_ignores_length(scale: float) -> None:
    x = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    u = unit_square(x)
    assert (u >= 0).all()
    torch.testing.assert_close(u.norm(dim=-2), torch.ones(2, 50))
    torch.testing.assert_close(u, x.square() / x.square().norm(dim=-2, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unit_square(scale * x), u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unit_square(x * -1), u, rtol=0, atol=0)


def test_unit_square_of_zero_is_zero() -> None:
    assert (unit_square(torch.zeros(1, 8, 3)) == 0).all()


def test_compact_weights_are_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 100, 16, generator=generator, dtype=torch.float64) * 10
    released = taylor2_weights(q, k, c=0.5)
    assert released.min() >= 0.25
    assert released.max() <= 1.25
    assert taylor2_paper_weights(q, k, alpha=0.7, gamma=0.3).min() >= 0.5 * (1 + 0.3**2)
    # The linear term may make up for a token's sign only while β⁴ <= α²(γ² + 1).
    assert taylor2_paper_weights(q, -k, alpha=1.0, beta=1.0, gamma=1.0).min() >= 0.5
    opposite = torch.full((1, 1, 16), 2**0.5 / 2, dtype=torch.float64)
    assert taylor2_paper_weights(opposite, -opposite, alpha=1.0, beta=2.0, gamma=1.0).min() < 0


def test_paper_form_is_the_released_one_on_normalised_tokens() -> None:
    """α is absorbed, and c² = (γ² + 1) / α²."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 100, 16, generator=generator, dtype=torch.float64)
    unit_q, unit_k = (x / x.square().norm(dim=-1, keepdim=True).sqrt() for x in (q, k))
    paper = taylor2_paper_weights(unit_q, unit_k, alpha=2.0, gamma=0.5)
    torch.testing.assert_close(paper, taylor2_weights(q, k, c=(1.25 / 4) ** 0.5) * 2)


def test_weights_of_both_signs_are_divided_by_the_number_of_keys() -> None:
    """So a larger image does not mean larger outputs; for taylor1 that is the sum of the weights, exactly."""
    q, k, v = torch.randn(3, 1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    for kernel in ("cosine", "mean", "taylor1"):
        weights = attention_weights(q, k, kernel)
        assert weights.min() < 0 < weights.max()
        twice = linear_attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), kernel)
        torch.testing.assert_close(twice, linear_attention(q, k, v, kernel), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention_weights(q, k, "taylor1").sum(-1), torch.ones(1, 2, 60))
    torch.testing.assert_close(attention_weights(q, k, "taylor1"), attention_weights(q, k + 3, "taylor1"))
    assert linear_attention(1e4 * q, 1e4 * k, v, "cosine").abs().max() <= v.abs().max()


def test_eps_is_added_to_the_sum_of_weights() -> None:
    """EfficientViT's own for its kernel, so that its weights mean the same here; any other where it is asked for."""
    q, k, v = 1e-6 * torch.rand(3, 1, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    row_sums = attention_weights(q, k, "relu").sum(-1)
    torch.testing.assert_close(row_sums, torch.ones(1, 2, 20), rtol=1e-3, atol=0)
    sums = (q @ k.mT).sum(-1)
    torch.testing.assert_close(attention_weights(q, k, "relu", eps=1e-10).sum(-1), sums / (sums + 1e-10))
    for eps in (None, 1e-10):
        want = reference_attention(q.double(), k.double(), v.double(), "relu", eps).float()
        torch.testing.assert_close(linear_attention(q, k, v, "relu", eps=eps), want, rtol=1e-4, atol=0)


def test_fp16_saturates_where_nothing_bounds_the_output() -> None:
    q = torch.full((1, 1, 3, 8), 1e3).half()
    out = linear_attention(q, q, q, "mean")
    assert (out == torch.finfo(torch.float16).max).all()


def test_kernels_by_hand() -> None:
    """q = (3, 4) and keys (4, 3), (0, -2), (-3, 4)."""
    q, k = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[4.0, 3.0], [0.0, -2.0], [-3.0, 4.0]]]])
    products = torch.tensor([24.0, -8.0, 7.0])
    angles = torch.tensor([24 / 25, -8 / 10, 7 / 25])
    s = products / 2**0.5
    cubes = [5 * x**3 / (x**3).norm() for x in (q, k[:, :, :1])] + [torch.tensor([0.0, 0.0]), torch.tensor([0.0, 4.0])]
    focus = torch.stack([(cubes[0] * cube).sum() for cube in cubes[1:]])
    want = {
        "relu": torch.tensor([24.0, 0.0, 16.0]) / 40,
        "mean": products / 3,
        "cosine": angles / 3,
        "angular": (0.5 + angles / torch.pi) / (1.5 + angles.sum() / torch.pi),
        "softmax": s.softmax(-1),
        "taylor2_full": (1 + s + s**2 / 2) / (1 + s + s**2 / 2).sum(),
        "taylor1": (1 + s - s.mean()) / 3,
        "focused": focus / focus.sum(),
    }
    for kernel, row in want.items():
        torch.testing.assert_close(attention_weights(q, k, kernel)[0, 0, 0], row, msg=lambda m, n=kernel: f"{n}: {m}")


def test_every_kernel_has_a_reference() -> None:
    assert REFERENCE_WEIGHTS.keys() == KERNELS.keys()


def test_the_derivatives_of_unit_square() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(unit_square, x)
    assert torch.autograd.gradgradcheck(unit_square, x)
