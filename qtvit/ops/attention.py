"""Attention with any of the similarity kernels, in two layouts: linear in the number of tokens, except for softmax.

From top to bottom: the public functions, shape checks and kernel scalars, precision, the contraction, and the
contraction of the default kernel with a hand-written backward pass.

Shapes: B batch, D channels per head of q and k, E channels per head of v, N query tokens, M key tokens, F features.
The contraction folds batch and heads into one dimension, also called B.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtvit.errors import unknown_name

from .kernels import KERNELS, LARGEST, SQUARE_EPS, Kernel, taylor2, unit_square, unit_square_and_norm

AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))
"""Devices with autocast; found at import, because torch.compile cannot trace the query."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str = "taylor2",
    scalars: Mapping[str, Tensor | float] | None = None,
    eps: float | None = None,
) -> Tensor:
    """Linear attention in the layout of ``torch.nn.functional.scaled_dot_product_attention``.

    O_i = Σ_j w_ij v_j / Σ_j w_ij (paper, eq. 3) with w_ij = <φ_q(q_i), φ_k(k_j)>, in O(N + M) time and memory; kernels
    with weights of both signs have another divisor (`qtvit.ops.kernels`). Inputs are fp32, bf16 or fp16, with or
    without autocast: norms, sums over tokens and the division run in fp32 (fp64 stays fp64). ``kernel="softmax"`` is
    `torch.nn.functional.scaled_dot_product_attention` under the same rules, in O(N·M).

    Args:
        q: (B, heads, N, D).
        k: (B, heads, M, D).
        v: (B, heads, M, E).
        kernel: a name in ``qtvit.ops.KERNELS``.
        scalars: values of the kernel's learnable scalars; those left out have their initial values.
        eps: added to each query's sum of weights; None: the kernel's own eps.

    Returns:
        (B, heads, N, E) in the dtype of v.

    Raises:
        ValueError: the shapes do not fit together, or the kernel or a scalar is unknown.
    """
    return linear_attention_cf(q.mT, k.mT, v.mT, kernel, scalars, eps).mT


def linear_attention_cf(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str = "taylor2",
    scalars: Mapping[str, Tensor | float] | None = None,
    eps: float | None = None,
) -> Tensor:
    """`linear_attention` with tokens last, the channels-first layout of convolutional feature maps.

    q (B, heads, D, N), k (B, heads, D, M), v (B, heads, E, M) -> (B, heads, E, N).
    """
    _check_shapes(q, k, v)
    spec = get_kernel(kernel)
    eps = spec.eps if eps is None else eps
    with full_precision(q) as upcast:
        given = {name: upcast(value) for name, value in _resolve_scalars(spec, scalars, q).items()}
        if spec.features is None:
            q, k, v, dtype = upcast(q), upcast(k), upcast(v), v.dtype
            return scaled_dot_product_attention(q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous()).mT.to(dtype)
        heads = v.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        # The hand-written backward pass needs a scalar c and plain autograd: compilers and exporters optimise the
        # plain operations better, and function transforms cannot enter this autograd function.
        if spec.features is taylor2 and given["c"].ndim == 0 and _is_plain_autograd(q, k, v):
            c_squared = given["c"].square().to(_at_least_fp32(q.dtype))
            out = _Taylor2Attention.apply(q, k, v, c_squared, eps, upcast is _upcast_saturating)
            return out.unflatten(0, heads)
        out = _attend(*spec.features(upcast(q), upcast(k), **given), upcast(v), eps, spec.normalized)
        # Normalised outputs are averages of values and fit their dtype; other outputs may be too large for fp16.
        return (out.to(v.dtype) if spec.normalized else _saturate(out, v.dtype)).unflatten(0, heads)


def attention_weights(
    q: Tensor,
    k: Tensor,
    kernel: str = "taylor2",
    scalars: Mapping[str, Tensor | float] | None = None,
    eps: float | None = None,
) -> Tensor:
    """The exact weights with which `linear_attention` averages the values, for any choice of queries.

    They are rows of the N x M matrix that `linear_attention` never forms. A row costs O(M·F), so pass only the queries
    of interest. ``attention_weights(q, k) @ v`` is the output of `linear_attention`. The weights of a normalised kernel
    sum to 1 over the keys (up to eps); `qtvit.ops.kernels` describes the others.

    Args:
        q: (B, heads, N, D), the queries of interest.
        k: (B, heads, M, D), all keys.
        kernel, scalars, eps: as for `linear_attention`.

    Returns:
        (B, heads, N, M) in fp32 (fp64 for fp64).
    """
    _check_shapes(q.mT, k.mT, k.mT)
    spec = get_kernel(kernel)
    with full_precision(q) as upcast:
        given = {name: upcast(value) for name, value in _resolve_scalars(spec, scalars, q).items()}
        q, k = upcast(q), upcast(k)
        if spec.features is None:
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        f_q, f_k, const = spec.features(q.mT, k.mT, **given)
        weights = f_q.mT @ f_k + const
        if not spec.normalized:
            return weights
        return weights / (weights.sum(-1, keepdim=True) + (spec.eps if eps is None else eps))


def masked_softmax_attention_cf(q: Tensor, k: Tensor, v: Tensor, threshold: float = 0.02) -> Tensor:
    """Softmax attention that keeps only weights above ``threshold``, channels-first; O(N·M) time and memory.

    This is the high-order residual that ViTALiTy and Castling-ViT add to linear attention during training (paper,
    Table 7): large weights are what linear attention lacks. 0.02 is the threshold of Castling-ViT's published code. The
    remaining weights are not renormalised.

    q (B, heads, D, N), k (B, heads, D, M), v (B, heads, E, M) -> (B, heads, E, N).
    """
    _check_shapes(q, k, v)
    with full_precision(q) as upcast:
        weights = (upcast(q).mT @ upcast(k) / q.shape[-2] ** 0.5).softmax(-1)
        return (upcast(v) @ weights.masked_fill(weights <= threshold, 0).mT).to(v.dtype)


def get_kernel(name: str) -> Kernel:
    """Look up a kernel by name.

    Raises:
        ValueError: there is no such kernel; the message lists the known names.
    """
    if name not in KERNELS:
        raise unknown_name("kernel", name, KERNELS)
    return KERNELS[name]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the shapes fit: q (B, heads, D, N), k (B, heads, D, M), v (B, heads, E, M)."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v need four dimensions, got {q.ndim}, {k.ndim}, {v.ndim}")
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(f"q and k differ in batch, heads or channels per head: {(*q.shape,)} and {(*k.shape,)}")
    if k.shape[:2] != v.shape[:2] or k.shape[3] != v.shape[3]:
        raise ValueError(f"k and v differ in batch, heads or tokens: {(*k.shape,)} and {(*v.shape,)}")


def _resolve_scalars(kernel: Kernel, given: Mapping[str, Tensor | float] | None, like: Tensor) -> dict[str, Tensor]:
    """The kernel's scalars as tensors on the device of ``like``; those not given have their initial values."""
    given = given or {}
    for name in given:
        if name not in kernel.scalars:
            raise unknown_name("kernel scalar", name, kernel.scalars)
    dtype = _at_least_fp32(like.dtype)
    return {
        name: value.to(like.device)
        if isinstance(value, Tensor)
        else torch.tensor(value, device=like.device, dtype=dtype)
        for name, value in {**kernel.scalars, **given}.items()
    }


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Disable autocast on the device of ``like`` and yield a function that casts tensors to fp32 (fp64 stays fp64).

    Without autocast, the gradient that the cast passes back to an fp16 input saturates at the largest fp16 number.
    Under autocast it may become infinite, because a loss scaler has to see the overflow to back off.
    """
    autocast = like.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(like.device.type)
    with torch.autocast(like.device.type, enabled=False) if autocast else contextlib.nullcontext():
        yield _upcast if autocast else _upcast_saturating


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _upcast(x: Tensor) -> Tensor:
    return x.to(_at_least_fp32(x.dtype))


def _upcast_saturating(x: Tensor) -> Tensor:
    return _SaturatingCast.apply(x) if x.dtype == torch.float16 and x.requires_grad else _upcast(x)


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x to ``dtype``; values too large for fp16 become its largest number instead of infinity."""
    if dtype == torch.float16:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


class _SaturatingCast(torch.autograd.Function):
    """Cast fp16 to fp32, with a gradient that saturates at the largest fp16 number instead of becoming infinite.

    The gradient of features that ignore the length of their input, as u(x) does, grows as 1/‖x‖.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _saturate(grad, torch.float16)


def _attend(f_q: Tensor, f_k: Tensor, const: Tensor | float, values: Tensor, eps: float, normalized: bool) -> Tensor:
    """Σ_j w_ij v_j with w_ij = <f_q_i, f_k_j> + const, divided by Σ_j w_ij + eps if ``normalized``.

    f_q (B, F, N), f_k (B, F, M), values (B, E, M) -> (B, E, N).
    """
    # The sum over keys comes first, so that no N x M tensor is formed.
    out = (values @ f_k.mT) @ f_q
    has_const = isinstance(const, Tensor) or const != 0
    if has_const:
        out = out + const * values.sum(-1, keepdim=True)
    if not normalized:
        return out
    weight_sum = f_k.sum(-1, keepdim=True).mT @ f_q
    if has_const:
        return out / (weight_sum + (const * f_k.shape[-1] + eps))
    if torch.compiler.is_exporting() and eps < 1e-6:  # the ONNX exporter drops the addition of so small a number
        return out / weight_sum.clamp_min(eps)
    return out / (weight_sum + eps)


def _is_plain_autograd(*tensors: Tensor) -> bool:
    """Whether eager autograd runs on plain tensors: no fx proxies, no compiler or exporter, no function transform."""
    return (
        torch.is_grad_enabled()
        and all(type(x) is Tensor for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _Taylor2Attention(torch.autograd.Function):
    """`_attend` with the features of `taylor2` and a hand-written backward pass.

    Forward and backward together take two thirds of the time of the plain operations.
    With S = Σ_j v_j u(k_j)ᵀ and z = Σ_j u(k_j)ᵀ, O = (S·u(q) + c²·Σ_j v_j) / (z·u(q) + c²·M + eps).

    Args:
        q, k, v: (B, D, N), (B, D, M), (B, E, M) of any dtype.
        c_squared: c² as a scalar tensor.
        eps: added to the sum of weights.
        saturating: whether fp16 gradients saturate at the largest fp16 number, see `full_precision`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c_squared: Tensor, eps: float, saturating: bool) -> Tensor:
        (u_q, norm_q), (u_k, norm_k), wide_v = (*(unit_square_and_norm(_upcast(x)) for x in (q, k)), _upcast(v))
        sums, u_sum, v_sum = wide_v @ u_k.mT, u_k.sum(-1, keepdim=True), wide_v.sum(-1, keepdim=True)
        total = torch.baddbmm(c_squared * k.shape[-1] + eps, u_sum.mT, u_q)
        out = torch.baddbmm(c_squared * v_sum, sums, u_q).div_(total)
        ctx.save_for_backward(q, k, v, c_squared, u_q, norm_q, u_k, norm_k, sums, u_sum, v_sum, total, out)
        ctx.eps, ctx.saturating = eps, saturating
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, c_squared, u_q, norm_q, u_k, norm_k, sums, u_sum, v_sum, total, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted
            return _Taylor2Attention._differentiable_backward(ctx, grad, q, k, v, c_squared)
        with full_precision(q):
            g = _upcast(grad) / total
            g_total = (g * out).sum(-2, keepdim=True).neg_()
            g_sum = g.sum(-1, keepdim=True)
            g_sums, g_u_sum = g @ u_q.mT, (g_total @ u_q.mT).mT
            g_q = _through_unit_square(torch.baddbmm(u_sum @ g_total, sums.mT, g), _upcast(q), u_q, norm_q)
            g_k = _through_unit_square(torch.baddbmm(g_u_sum, g_sums.mT, _upcast(v)), _upcast(k), u_k, norm_k)
            g_v = torch.baddbmm(c_squared * g_sum, g_sums, u_k)
            g_c_squared = (g_sum * v_sum).sum() + k.shape[-1] * g_total.sum()
        cast = _saturate if ctx.saturating else Tensor.to
        return cast(g_q, q.dtype), cast(g_k, k.dtype), cast(g_v, v.dtype), g_c_squared, None, None

    @staticmethod
    def _differentiable_backward(
        ctx: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, c_squared: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The same gradients from autograd on the plain operations, so that they can be differentiated again."""
        inputs = [x for x, needed in zip((q, k, v, c_squared), ctx.needs_input_grad, strict=False) if needed]
        upcast = _upcast_saturating if ctx.saturating else _upcast
        with full_precision(q):
            f_q, f_k = unit_square(upcast(q)), unit_square(upcast(k))
            out = _attend(f_q, f_k, c_squared, upcast(v), ctx.eps, normalized=True).to(v.dtype)
            grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
        return (*(next(grads) if needed else None for needed in ctx.needs_input_grad[:4]), None, None)


def _through_unit_square(grad: Tensor, x: Tensor, u: Tensor, norm: Tensor) -> Tensor:
    """Gradient of x from that of u(x): ∂u_i/∂x_j = 2·x_j/‖x²‖·(δ_ij - u_i·u_j), where ``norm`` is ‖x²‖."""
    # Where the floor SQUARE_EPS stands in for ‖x²‖, the norm is a constant, which leaves δ_ij alone.
    along_u = (grad * u).sum(-2, keepdim=True) * (norm > SQUARE_EPS)
    return torch.addcmul(grad, u, along_u, value=-1).mul_(x.clamp(-LARGEST, LARGEST)).mul_(2 / norm)
