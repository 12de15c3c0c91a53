"""Attention with any kernel: O(N) in the number of tokens unless it is softmax; in both layouts.

Shapes: B batch, D channels per head of q and k, E channels per head of v, N query tokens, M key tokens, F features.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtvit.errors import unknown_name

from .kernels import KERNELS, Kernel

TINY = 1e-6
"""An eps below it is a floor of the sum of weights in exported graphs: the exporter to ONNX drops such additions."""
AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))
"""Asked once, as compilers cannot trace the question."""


def get_kernel(name: str) -> Kernel:
    """The kernel of that name; ValueError with the known names if there is none."""
    if name not in KERNELS and name.startswith("table3_"):
        raise ValueError(f"kernel {name!r} of an ablation is known only within qtvit.training.table3.table3_kernels()")
    if name not in KERNELS:
        raise unknown_name("kernel", name, KERNELS)
    return KERNELS[name]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str = "taylor2",
    scalars: Mapping[str, Tensor | float] | None = None,
    eps: float | None = None,
) -> Tensor:
    """Linear attention in the layout of ``torch.nn.functional.scaled_dot_product_attention``.

    O_i = Σ_j w_ij v_j / Σ_j w_ij (paper, eq. 3) with w_ij = <φ_q(q_i), φ_k(k_j)>, in O(N + M) time and memory. Takes
    fp32, bf16 and fp16 with or without autocast: norms, sums over tokens and the division run in fp32 (fp64 stays
    fp64). ``kernel="softmax"`` is `torch.nn.functional.scaled_dot_product_attention` under the same rules, in O(N·M).

    Args:
        q: (B, heads, N, D).
        k: (B, heads, M, D).
        v: (B, heads, M, E).
        kernel: a name in ``qtvit.ops.KERNELS``.
        scalars: values of the kernel's learnable scalars; those left out keep their initial values.
        eps: what is added to the sum of weights; None: the kernel's own.

    Returns:
        (B, heads, N, E) in the dtype of v.

    Raises:
        ValueError: shapes that do not fit together, an unknown kernel or scalar.
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
    """`linear_attention` channels-first.

    q (B, heads, D, N), k (B, heads, D, M), v (B, heads, E, M) -> (B, heads, E, N).
    """
    _check_shapes(q, k, v)
    spec = get_kernel(kernel)
    with full_precision(q) as upcast:
        given = {name: upcast(value) for name, value in _resolve_scalars(spec, scalars, q).items()}
        q, k, values = upcast(q), upcast(k), upcast(v)
        if spec.features is None:
            out = scaled_dot_product_attention(q.mT.contiguous(), k.mT.contiguous(), values.mT.contiguous()).mT
            return out.to(v.dtype)
        q, k, values = q.flatten(0, 1), k.flatten(0, 1), values.flatten(0, 1)
        f_q, f_k, const = spec.features(q, k, **given)
        # w_ij = <f_q_i, f_k_j> + const, summed over j before it meets the query: nothing here is N x M.
        out = (values @ f_k.mT) @ f_q
        if has_const := isinstance(const, Tensor) or const != 0:
            out = out + const * values.sum(-1, keepdim=True)
        if not spec.normalized:
            return _saturate(out, v.dtype).unflatten(0, v.shape[:2])
        weight_sum = f_k.sum(-1, keepdim=True).mT @ f_q
        offset = spec.eps if eps is None else eps
        if torch.compiler.is_exporting() and not has_const and offset < TINY:
            weight_sum = weight_sum.clamp_min(offset)
        else:
            weight_sum = weight_sum + (const * k.shape[-1] + offset if has_const else offset)
        return (out / weight_sum).to(v.dtype).unflatten(0, v.shape[:2])


def attention_weights(
    q: Tensor,
    k: Tensor,
    kernel: str = "taylor2",
    scalars: Mapping[str, Tensor | float] | None = None,
    eps: float | None = None,
) -> Tensor:
    """The exact weights with which `linear_attention` averages the values: any rows of the N x M matrix it never forms.

    A row costs O(M·F), so ask for the queries of interest. ``attention_weights(q, k) @ v`` is the output of
    `linear_attention`. The weights of a normalised kernel sum to 1 over the keys; `qtvit.ops.kernels` has the others.

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
    """Softmax attention of which only weights above ``threshold`` count, channels-first; O(N·M) time and memory.

    The high-order residual that ViTALiTy and Castling-ViT add to linear attention while they train (paper, Table 7):
    large weights are what linear attention lacks. 0.02 is the threshold of Castling-ViT's published code; what is left
    is not normalised again.

    q (B, heads, D, N), k (B, heads, D, M), v (B, heads, E, M) -> (B, heads, E, N).
    """
    _check_shapes(q, k, v)
    with full_precision(q) as upcast:
        weights = (upcast(q).mT @ upcast(k) / q.shape[-2] ** 0.5).softmax(-1)
        return (upcast(v) @ weights.masked_fill(weights <= threshold, 0).mT).to(v.dtype)


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Autocast off for ``like``'s device; gives what casts inputs to fp32."""
    autocast = like.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(like.device.type)
    with torch.autocast(like.device.type, enabled=False) if autocast else contextlib.nullcontext():
        yield _upcast if autocast else _upcast_saturating


def _resolve_scalars(kernel: Kernel, given: Mapping[str, Tensor | float] | None, like: Tensor) -> dict[str, Tensor]:
    """The kernel's scalars as tensors on ``like``'s device, with initial values where none is given."""
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


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q (B, heads, D, N), k (B, heads, D, M) and v (B, heads, E, M) belong together."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v need four dimensions, got {q.ndim}, {k.ndim}, {v.ndim}")
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(f"q and k differ in batch, heads or channels per head: {(*q.shape,)} and {(*k.shape,)}")
    if k.shape[:2] != v.shape[:2] or k.shape[3] != v.shape[3]:
        raise ValueError(f"k and v differ in batch, heads or tokens: {(*k.shape,)} and {(*v.shape,)}")


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _upcast(x: Tensor) -> Tensor:
    return x.to(_at_least_fp32(x.dtype))


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as ``dtype``; of what is too large for fp16, fp16's largest number."""
    if dtype == torch.float16:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def _upcast_saturating(x: Tensor) -> Tensor:
    return _SaturatingCast.apply(x) if x.dtype == torch.float16 and x.requires_grad else _upcast(x)


class _SaturatingCast(torch.autograd.Function):
    """fp16 -> fp32 whose gradient saturates at fp16's largest number instead of turning infinite.

    The gradient of a kernel that ignores the length of its input, as u(x) does, grows as 1/‖x‖. Under autocast the
    gradient is left infinite, as a loss scaler has to see it to back off.
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
        largest = torch.finfo(torch.float16).max
        return grad.clamp(-largest, largest).half()
