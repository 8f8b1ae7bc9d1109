"""Attention as PyTorch sees it: two operators with CPU, CUDA and fake kernels, and the choice of who serves.

As operators of the dispatcher they can be saved by selective activation checkpointing, compiled through
without a break in the graph, and counted by PyTorch's FLOP counter.

Shapes: B batch, H heads, M queries, N keys, D width of a head.
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from dtrain.kernels import attention_dense as dense
from dtrain.kernels import reference
from dtrain.kernels.launch import arch_of

__all__ = ["Backend", "attention", "merge"]

Backend = Literal["auto", "triton", "sdpa", "reference"]

# Where the kernel was measured to be faster than PyTorch's attention: architecture -> head dims. Wherever
# nothing was measured, "auto" is PyTorch's.
_FASTER: Mapping[str, frozenset[int]] = {}

_log = logging.getLogger(__name__)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if not dense.refusal(q.device, q.dtype, q.shape[-1]):  # Triton's interpreter
        return dense.forward(q, k, v, scale)
    out, lse = reference.attention_with_lse(q, k, v, scale)
    return dense.empty_like(q).copy_(out), lse


def _cpu_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not dense.refusal(q.device, q.dtype, q.shape[-1]):
        return dense.backward(grad_out, grad_lse, q, k, v, *saved)
    dq, dk, dv = reference.attention_backward(grad_out, grad_lse, q, k, v, *saved)
    return dense.empty_like(q).copy_(dq), dense.empty_like(k).copy_(dk), dense.empty_like(v).copy_(dv)


torch.library.define(
    "dtrain::attention_forward", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)"
)
torch.library.impl("dtrain::attention_forward", "cuda", dense.forward)
torch.library.impl("dtrain::attention_forward", "cpu", _cpu_forward)
torch.library.register_fake(
    "dtrain::attention_forward", lambda q, k, v, scale: (dense.empty_like(q), dense.empty_lse(q))
)

torch.library.define(
    "dtrain::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)
torch.library.impl("dtrain::attention_backward", "cuda", dense.backward)
torch.library.impl("dtrain::attention_backward", "cpu", _cpu_backward)
torch.library.register_fake(
    "dtrain::attention_backward", lambda grad_out, grad_lse, *qkv: tuple(dense.empty_like(x) for x in qkv[:3])
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # lse seldom has a gradient


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.dtrain.attention_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.scale)
    return *grads, None


torch.library.register_autograd("dtrain::attention_forward", _backward, setup_context=_save)


@register_flop_formula(torch.ops.dtrain.attention_forward)
def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@register_flop_formula(torch.ops.dtrain.attention_backward)
def _backward_flops(grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    # As PyTorch counts its own: five products, although the two kernels here do seven.
    return int(sdpa_backward_flop_count(grad_out, q, k, v))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(
    wanted: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, return_lse: bool
) -> Backend:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    return _chosen(wanted, device, dtype, head_dim, return_lse)


@functools.cache
def _chosen(
    wanted: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, return_lse: bool
) -> Backend:
    refusals: dict[Backend, str] = {
        "triton": dense.refusal(device, dtype, head_dim),
        "sdpa": "it returns no log-sum-exp" if return_lse else "",
        "reference": "",
    }
    if wanted not in (*refusals, "auto"):
        raise ValueError(f"backend = {wanted!r}: must be one of 'auto', {str([*refusals])[1:-1]}")
    if refusals.get(wanted):
        raise ValueError(f"backend = {wanted!r}: {refusals[wanted]}; backend = 'auto' finds one that serves")
    order = _preference(device, head_dim) if wanted == "auto" else [wanted]
    chosen = next(name for name in order if not refusals[name])
    _log.info("attention on %s, %s, head dim %d: %s", device.type, dtype, head_dim, chosen)
    return chosen


def _preference(device: torch.device, head_dim: int) -> list[Backend]:
    if device.type != "cuda":
        return ["sdpa", "reference"]
    if head_dim in _FASTER.get(arch_of(device), ()):
        return ["triton", "sdpa", "reference"]
    return ["sdpa", "triton", "reference"]


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        raise ValueError(f"{shapes}: must be (B, H, M, D), (B, H, N, D), (B, H, N, D)")
    if min(q.shape) < 1 or k.shape[2] < 1:
        raise ValueError(f"{shapes}: every size must be at least 1")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: must be one")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale = {scale}: must be positive")


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v for every head, differentiable, summed in fp32.

    Views with any strides are read in place as long as the last dim is contiguous, such as those of a packed
    qkv. Under autocast the inputs are cast as PyTorch's own attention casts them.

    Args:
        q: (B, H, M, D); every size at least 1.
        k, v: (B, H, N, D) in q's dtype.
        scale: 1/√D when None.
        return_lse: also return the log-sum-exp, natural, (B, H, M) in fp32 or better; it has a gradient too.
        backend: "triton" is the kernel of `attention_dense`, for fp16, bf16, fp32 and head dims 32, 40 … 128;
            "sdpa" is PyTorch's; "reference" stores the scores. "auto" is PyTorch's, except where the kernel
            was measured to be faster, or where the log-sum-exp is asked for.
    Returns: out (B, H, M, D), or (out, lse).
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    _check(q, k, v, scale)
    chosen = _choose(backend, q.device, q.dtype, q.shape[-1], return_lse)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    op = torch.ops.dtrain.attention_forward if chosen == "triton" else reference.attention_with_lse
    out, lse = op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of a and b together, from attention to each: the step of ring attention.

    Args:
        out_a, out_b: (B, H, M, D).
        lse_a, lse_b: (B, H, M) log-sum-exps, natural; -inf where a row saw no key.
    Returns: (out, lse); out in the wider dtype of the two, so that a running fp32 `out_a` stays fp32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == -math.inf, 0.0)  # no key in either: weights 0, not exp(-inf + inf)
    weight_a, weight_b = (torch.exp(x - shift)[..., None] for x in (lse_a, lse_b))
    out = out_a * weight_a + out_b * weight_b
    return out.to(torch.promote_types(out_a.dtype, out_b.dtype)), lse
