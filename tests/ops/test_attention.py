"""Linear attention against its N x M reference: outputs, gradients, layouts, precisions, sizes and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qtvit.ops import (
    KERNELS,
    attention_weights,
    get_kernel,
    linear_attention,
    linear_attention_cf,
    masked_softmax_attention_cf,
    reference_attention,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (name, kernel, scalars away from their initial values); a new kernel is picked up with scalars drawn here.
VARIANTS = [(name, {s: 0.6 + 0.3 * i for i, s in enumerate(spec.scalars)}) for name, spec in KERNELS.items()]
variants = pytest.mark.parametrize(("kernel", "scalars"), [pytest.param(*v, id=v[0]) for v in VARIANTS])

# B, heads, N, M, D, E
SIZES = [(2, 3, 17 * 13, 17 * 13, 16, 16), (2, 1, 1, 1, 8, 8), (1, 2, 5, 64, 3, 7), (1, 2, 40, 1, 32, 4)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def make_inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v as (B, heads, N, D) and the gradient of the output."""
    batch, heads, n, m, d, e = size
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, chans, generator=generator).to(dtype)
        for tokens, chans in ((n, d), (m, d), (m, e), (n, e))
    )


def run(
    attention: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    kernel: str,
    scalars: dict[str, float],
    scalar_dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Output, gradients of q, k, v, gradients of the scalars."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    leaves = {name: torch.tensor(value, dtype=scalar_dtype, requires_grad=True) for name, value in scalars.items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        if attention is reference_attention:
            out = reference_attention(q, k, v, kernel, **leaves)
        else:
            out = attention(q, k, v, kernel, leaves)
    grads = torch.autograd.grad(out, [q, k, v, *leaves.values()], inputs[3].to(out.dtype))
    return [out.detach(), *grads]


def run_reference(inputs: tuple[Tensor, ...], kernel: str, scalars: dict[str, float]) -> list[Tensor]:
    return run(reference_attention, tuple(x.double() for x in inputs), kernel, scalars, torch.float64)


def channels_first(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """`linear_attention_cf` behind the other layout, on contiguous (B, heads, D, N) tensors."""
    out = linear_attention_cf(q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous(), *args)
    return out.mT


def assert_matches(ours: list[Tensor], reference: list[Tensor], dtype: torch.dtype) -> None:
    """Equal up to fp32 arithmetic and one rounding to ``dtype``: nothing in between may be less precise."""
    rounding = 0.51 * torch.finfo(dtype).eps
    for i, (got, want) in enumerate(zip(ours, reference, strict=True)):
        assert got.shape == want.shape
        excess = (got.double() - want).abs() - rounding * want.abs()
        noise = 2e-6 if want.abs().max() > 1e-6 else 2e-5  # what cancels in a gradient that is truly zero
        noise = noise if got.ndim else 1e-4  # a scalar's is a sum over everything
        assert excess.max() <= 5e-6 * want.abs().max() + noise, f"tensor {i}: off by {excess.max():.2e}"


@variants
@sizes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", [linear_attention, channels_first])
def test_matches_reference(
    kernel: str, scalars: dict[str, float], size: tuple[int, ...], dtype: torch.dtype, attention: Callable[..., Tensor]
) -> None:
    inputs = make_inputs(size, dtype)
    ours = run(attention, inputs, kernel, scalars)
    assert [x.dtype for x in ours[:4]] == [dtype] * 4
    assert_matches(ours, run_reference(inputs, kernel, scalars), dtype)


@variants
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(
    kernel: str, scalars: dict[str, float], autocast: torch.dtype, dtype: torch.dtype
) -> None:
    inputs = make_inputs(SIZES[0], dtype)
    ours = run(linear_attention, inputs, kernel, scalars, autocast=autocast)
    assert ours[0].dtype == dtype
    assert_matches(ours, run_reference(inputs, kernel, scalars), dtype)


@variants
def test_non_contiguous_inputs(kernel: str, scalars: dict[str, float]) -> None:
    inputs = make_inputs((2, 3, 30, 26, 8, 8))
    strided = tuple(x.flip(0)[:, 1:, ::2].mT for x in inputs)
    assert not any(x.is_contiguous() or x.mT.is_contiguous() for x in strided)
    packed = tuple(x.contiguous() for x in strided)
    for ours, plain in zip(
        run(linear_attention_cf, strided, kernel, scalars),
        run(linear_attention_cf, packed, kernel, scalars),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-6)


@given(
    size=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 50)] * 2, *[st.integers(1, 20)] * 2),
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from(DTYPES),
    attention=st.sampled_from([linear_attention, channels_first]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    size: tuple[int, ...],
    variant: tuple[str, dict[str, float]],
    dtype: torch.dtype,
    attention: Callable[..., Tensor],
    seed: int,
) -> None:
    inputs = make_inputs(size, dtype, seed)
    assert_matches(run(attention, inputs, *variant), run_reference(inputs, *variant), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scalars_start_at_their_initial_values(kernel: str) -> None:
    q, k, v, _ = make_inputs(SIZES[0])
    explicit = linear_attention(q, k, v, kernel, KERNELS[kernel].scalars)
    torch.testing.assert_close(linear_attention(q, k, v, kernel), explicit, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [name for name, spec in KERNELS.items() if spec.normalized])
def test_weights_of_a_query_sum_to_one(kernel: str) -> None:
    q, k, v, _ = make_inputs((2, 3, 60, 70, 16, 4))
    if kernel in ("relu", "focused"):  # these may leave a query without any weight
        q, k = q.abs(), k.abs()
    constant = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(linear_attention(q, k, constant, kernel), constant[:, :, :60], rtol=1e-5, atol=1e-6)
    one_token = linear_attention(q, k[:, :, :1], v[:, :, :1], kernel)
    torch.testing.assert_close(one_token, v[:, :, :1].expand_as(one_token), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@variants
def test_any_row_of_the_weights_is_exact(kernel: str, scalars: dict[str, float], dtype: torch.dtype) -> None:
    q, k, v, _ = make_inputs((2, 3, 60, 17 * 5, 16, 4), dtype)
    wide = q.double(), k.double()
    want = reference_attention(*wide, torch.eye(85, dtype=torch.float64).expand(2, 3, 85, 85), kernel, **scalars)
    rows = attention_weights(q[:, :, 7:9], k, kernel, scalars)
    assert rows.dtype == torch.float32
    assert rows.shape == (2, 3, 2, 85)
    torch.testing.assert_close(rows.double(), want[:, :, 7:9], rtol=1e-4, atol=1e-6)
    out = linear_attention(q, k, v, kernel, scalars)[:, :, 7:9]
    torch.testing.assert_close((rows @ v.float()).to(dtype), out, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_masked_softmax_keeps_what_exceeds_the_threshold() -> None:
    q, k, v, _ = make_inputs((2, 3, 30, 40, 16, 4))
    weights = attention_weights(q, k, "softmax")
    assert 0 < (weights > 0.05).sum() < weights.numel() / 2
    want = torch.where(weights > 0.05, weights, 0) @ v
    torch.testing.assert_close(masked_softmax_attention_cf(q.mT, k.mT, v.mT, 0.05).mT, want)
    full = masked_softmax_attention_cf(q.mT, k.mT, v.mT, 0.0).mT
    torch.testing.assert_close(full, linear_attention(q, k, v, "softmax"), rtol=1e-5, atol=1e-6)
    half = masked_softmax_attention_cf(*(x.mT.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16


def taylor2_inputs(dtype: torch.dtype, magnitude: float = 1, tokens: tuple[int, int] = (7, 9)) -> list[Tensor]:
    """q, k, v and c, all of which are trained."""
    generator = torch.Generator().manual_seed(0)
    q, k = (magnitude * torch.randn(2, 2, n, 5, generator=generator) for n in tokens)
    v = torch.randn(2, 2, tokens[1], 3, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, torch.tensor(1.3))]


def taylor2_attention(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return linear_attention(q, k, v, "taylor2", {"c": c})


@pytest.mark.parametrize("magnitude", [0, 1e-20, 1e-16, 1e-13, 1e-6, 1, 1e4, 1e20])
def test_the_written_out_derivative_is_that_of_autograd(magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = taylor2_inputs(torch.float32, magnitude, (30, 40))
    out = taylor2_attention(*inputs)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    monkeypatch.setattr("qtvit.ops.attention._is_plain_autograd", lambda *_: False)
    plain = taylor2_attention(*inputs)
    assert str(plain.grad_fn) != str(out.grad_fn)
    torch.testing.assert_close(out, plain)
    for got, want in zip(ours, torch.autograd.grad(plain, inputs, grad), strict=True):
        # beyond 1e9 entries count as 1e9, whose derivative is not quite 0; that of c is a sum of terms of both signs
        least = 1e-9 if want.ndim else 1e-5
        torch.testing.assert_close(got, want, rtol=1e-4, atol=max(1e-5 * float(want.abs().max()), least))


def test_first_and_second_derivatives() -> None:
    inputs = taylor2_inputs(torch.float64, tokens=(3, 4))
    assert torch.autograd.gradcheck(taylor2_attention, inputs)
    assert torch.autograd.gradgradcheck(taylor2_attention, inputs)


@pytest.mark.parametrize("again", [False, True])
def test_derivatives_keep_their_precision(again: bool) -> None:
    """In autocast they are fp32's, and those of fp16 saturate, also where the graph is kept for a second derivative."""
    inputs = taylor2_inputs(torch.float32, tokens=(30, 40))
    out = taylor2_attention(*inputs)
    want = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out.square().sum(), inputs, create_graph=again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    q, *others = taylor2_inputs(torch.float16, tokens=(30, 40))
    q = (q.detach() * 1e-6).requires_grad_()
    out = taylor2_attention(q, *others)
    grad = torch.autograd.grad(out, q, 1e4 * torch.ones_like(out), create_graph=again)[0]
    assert grad.isfinite().all()
    assert (grad.abs() == torch.finfo(torch.float16).max).any()


def test_batched_derivatives_and_scalars_of_other_kinds() -> None:
    q, k, v, c = taylor2_inputs(torch.float64, tokens=(3, 4))
    out = taylor2_attention(q, k, v, c)
    grads = torch.randn(2, *out.shape, dtype=torch.double)
    batched = torch.autograd.grad(out, q, grads, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched[1], torch.autograd.grad(out, q, grads[1])[0])
    for scalar in (c.detach().float(), c.detach().view(1)):
        scalar.requires_grad_()
        torch.testing.assert_close(taylor2_attention(q, k, v, scalar), out, rtol=1e-6, atol=1e-6)
        taylor2_attention(q, k, v, scalar).sum().backward()
        assert scalar.grad is not None
        assert scalar.grad.shape == scalar.shape


@pytest.mark.parametrize("trained", range(4))
def test_derivatives_of_one_input_alone(trained: int) -> None:
    inputs = taylor2_inputs(torch.float64)
    want = torch.autograd.grad(taylor2_attention(*inputs).square().sum(), inputs[trained])
    inputs = [x.detach().requires_grad_(i == trained) for i, x in enumerate(inputs)]
    torch.testing.assert_close(
        torch.autograd.grad(taylor2_attention(*inputs).square().sum(), inputs[trained], create_graph=True), want
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_order_of_tokens(kernel: str) -> None:
    """The order of the keys does not matter, and the output follows the order of the queries."""
    q, k, v, _ = make_inputs((2, 3, 60, 70, 16, 4))
    out = linear_attention(q, k, v, kernel)
    keys, queries = torch.randperm(70), torch.randperm(60)
    shuffled = linear_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], kernel)
    torch.testing.assert_close(shuffled, out[:, :, queries], rtol=1e-5, atol=1e-6)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("kernel", "scalars"), [pytest.param(*v, id=v[0]) for v in VARIANTS if v[0] != "softmax"])
def test_linear_in_tokens(kernel: str, scalars: dict[str, float]) -> None:
    """No N x N tensor in forward or backward, and twice the tokens cost twice the multiplications."""
    flops = []
    for n in (2048, 4096):
        inputs = make_inputs((1, 1, n, n, 16, 16))
        with _LargestTensor() as largest, FlopCounterMode(display=False) as counter:
            run(linear_attention, inputs, kernel, scalars)
        assert 16 * n <= largest.numel < n * n / 8
        flops.append(counter.get_total_flops())
    assert flops[1] == 2 * flops[0]


class _Attention(nn.Module):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, self.kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exports_for_any_number_of_tokens(kernel: str) -> None:
    """Compilers get the same numbers from a graph traced at another size."""
    attention, n = _Attention(kernel), torch.export.Dim("n", min=2, max=4096)
    traced, other = make_inputs((2, 2, 30, 30, 8, 8))[:3], make_inputs((2, 2, 65, 65, 8, 8), seed=1)[:3]
    program = torch.export.export(attention, traced, dynamic_shapes=[{2: n}] * 3).module()
    torch.testing.assert_close(program(*other), attention(*other), rtol=1e-5, atol=1e-6)


SHAPES = {"q": (2, 3, 10, 8), "k": (2, 3, 12, 8), "v": (2, 3, 12, 5)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": (3, 10, 8)}, "need four dimensions, got 3, 4, 4"),
        ({"v": (2, 3, 12)}, "need four dimensions, got 4, 4, 3"),
        ({"q": (2, 3, 10, 9)}, r"q and k differ in .*\(2, 3, 9, 10\) and \(2, 3, 8, 12\)"),
        ({"q": (1, 3, 10, 8)}, "q and k differ"),
        ({"q": (2, 1, 10, 8)}, "q and k differ"),
        ({"v": (2, 3, 10, 5)}, r"k and v differ in .*\(2, 3, 8, 12\) and \(2, 3, 5, 10\)"),
        ({"v": (1, 3, 12, 5)}, "k and v differ"),
        ({"v": (2, 1, 12, 5)}, "k and v differ"),
    ],
    ids=str,
)
def test_shape_errors(wrong: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(*(torch.zeros(shape) for shape in {**SHAPES, **wrong}.values()))


def test_unknown_kernel_and_scalar_are_named_with_what_is_known() -> None:
    q, k, v, _ = make_inputs(SIZES[1])
    with pytest.raises(ValueError, match=r"unknown kernel 'tailor2'.*taylor2"):
        get_kernel("tailor2")
    with pytest.raises(ValueError, match="unknown kernel 'tailor2'"):
        linear_attention(q, k, v, kernel="tailor2")
    with pytest.raises(ValueError, match=r"unknown kernel scalar 'gama'.*gamma"):
        linear_attention(q, k, v, "taylor2_paper", {"gama": 1.0})
    with pytest.raises(ValueError, match=r"unknown kernel scalar 'alpha'.*\bc\b"):
        linear_attention(q, k, v, "taylor2", {"alpha": 1.0})


@pytest.mark.parametrize("kernel", KERNELS)
def test_float64_is_kept(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert linear_attention(q, k, v, kernel).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *qkv: linear_attention(*qkv, kernel), (q, k, v))


def test_fp16_gradient_of_a_scalar_stays_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 8, 4096, 16, generator=generator).half() for _ in range(2))
    v = (k.float().abs() * 1e4).clamp(max=6e4).half()
    c = torch.tensor(1.0).half().requires_grad_()
    linear_attention(q, k, v, "taylor2", {"c": c}).float().sum().backward()
    assert c.grad is not None
    assert c.grad.isfinite()


def test_fp16_gradients_under_autocast_overflow_for_the_loss_scaler_to_see() -> None:
    q = torch.full((1, 1, 2, 2), 1e-6, dtype=torch.float16)
    q[..., 0] *= 2
    q.requires_grad_()
    k, v = torch.eye(2).half()[None, None], torch.tensor([[[[0.0], [1000.0]]]]).half()
    for enabled, finite in ((True, False), (False, True)):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            out = linear_attention(q, k, v)
        (grad,) = torch.autograd.grad(out.float().sum(), q)
        assert bool(grad.isfinite().all()) == finite


def test_fp16_works_under_functorch() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).half()
    grad = torch.func.grad(lambda x: linear_attention(x, k, v).float().sum())(q)
    assert grad.shape == q.shape


def test_float_scalars_keep_float64() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    reference = reference_attention(q, k, v, c=0.7)
    torch.testing.assert_close(linear_attention(q, k, v, scalars={"c": 0.7}), reference, rtol=1e-12, atol=1e-12)
