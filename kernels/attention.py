"""Attention as PyTorch sees it: two operators with CPU, CUDA and fake kernels, and what calls them.

As operators of the dispatcher they can be saved by selective activation checkpointing, compiled through
without a break in the graph, and counted by PyTorch's FLOP counter.

Shapes: B batch, H heads, M queries, N keys, D width of a head.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from dtrain.kernels import attention_backward, attention_forward, reference
from dtrain.kernels.attention_choice import Backend, backward_form, serving
from dtrain.kernels.attention_launch import empty_like, empty_lse, refusal
from dtrain.kernels.block_mask import BlockLists, BlockMask
from dtrain.kernels.op import Operator

__all__ = [
    "Backend", "attention", "merge",
    "MASK", "flatten", "unflatten", "as_autocast", "check", "computed_flops",
]  # fmt: skip

# A block mask as the dispatcher takes it; dense attention has None and zeros.
MASK = (
    "Tensor? query_blocks, Tensor? query_entries, Tensor? key_blocks, Tensor? key_entries, "
    "SymInt block_q, SymInt block_k, SymInt pairs"
)


def flatten(mask: BlockMask | None) -> tuple[Any, ...]:
    """The mask as the last seven arguments of an operator."""
    return (*mask.queries, *mask.keys, *mask.block, mask.pairs) if mask else (None,) * 4 + (0,) * 3


def unflatten(flat: Sequence[Any], q: Tensor, k: Tensor) -> BlockMask | None:
    """What `flatten` took apart."""
    if flat[0] is None:
        return None
    lists, block, pairs = flat[:4], flat[4:6], flat[6]
    queries, keys = BlockLists(*lists[:2]), BlockLists(*lists[2:])
    return BlockMask((q.shape[2], k.shape[2]), (block[0], block[1]), queries, keys, pairs)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *flat: Any) -> tuple[Tensor, Tensor]:
    return attention_forward.forward(q, k, v, scale, unflatten(flat, q, k))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *flat: Any) -> tuple[Tensor, Tensor]:
    if not refusal(q.device, q.dtype, q.shape[-1]):  # Triton's interpreter
        return _cuda_forward(q, k, v, scale, *flat)
    mask = unflatten(flat, q, k)
    out, lse = reference.attention_with_lse(q, k, v, scale, mask.dense() if mask else None)
    return empty_like(q).copy_(out), lse


def _cuda_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = unflatten(flat, q, k)
    form = backward_form(q.device, q.shape[-1], k.shape[2], mask is not None)
    return attention_backward.backward(grad_out, grad_lse, q, k, v, out, lse, scale, mask, form)


def _cpu_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not refusal(q.device, q.dtype, q.shape[-1]):
        return _cuda_backward(grad_out, grad_lse, q, k, v, *rest)
    out, lse, scale, *flat = rest
    mask = unflatten(flat, q, k)
    seen = mask.dense() if mask else None
    grads = reference.attention_backward(grad_out, grad_lse, q, k, v, out, lse, scale, seen)
    dq, dk, dv = (empty_like(x).copy_(grad) for x, grad in zip((q, k, v), grads, strict=True))
    return dq, dk, dv


def _forward_flops(q: Any, k: Any, v: Any, scale: Any, *flat: Any, **_: Any) -> int:
    return computed_flops(int(sdpa_flop_count(q, k, v)), q, k, flat[-1])


def _backward_flops(grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    # As PyTorch counts its own: five products, although the split form does seven.
    return computed_flops(int(sdpa_backward_flop_count(grad_out, q, k, v)), q, k, rest[-1])


def computed_flops(flops: int, q: Any, k: Any, pairs: int) -> int:
    """The part of dense attention's FLOPs that a mask of so many pairs leaves; all without a mask."""
    return flops * pairs // (q[2] * k[2]) if pairs else flops


_backward_op = Operator(
    "dtrain::attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, float scale, {MASK}) -> (Tensor dq, Tensor dk, Tensor dv)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=lambda grad_out, grad_lse, *qkv: tuple(empty_like(x) for x in qkv[:3]),
    flops=_backward_flops,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (q, k, v, ctx.scale), lists, ctx.sizes = inputs[:4], inputs[4:8], inputs[8:]
    ctx.save_for_backward(q, k, v, *output, *lists)
    ctx.set_materialize_grads(False)  # lse seldom has a gradient


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_op(grad_out, grad_lse, q, k, v, out, lse, ctx.scale, *lists, *ctx.sizes)
    return *grads, *[None] * 8


_forward_op = Operator(
    f"dtrain::attention_forward(Tensor q, Tensor k, Tensor v, float scale, {MASK})"
    " -> (Tensor out, Tensor lse)",
    cpu=_cpu_forward,
    cuda=_cuda_forward,
    fake=lambda q, *_: (empty_like(q), empty_lse(q)),
    flops=_forward_flops,
    save=_save,
    backward=_backward,
)


def _dense(q: Tensor, k: Tensor, *flat: Any) -> Tensor:
    mask = unflatten(flat, q, k)
    assert mask is not None
    return mask.dense()


_dense_op = Operator(
    f"dtrain::dense_mask(Tensor q, Tensor k, {MASK}) -> Tensor",
    cpu=_dense,
    cuda=_dense,
    fake=lambda q, k, *_: q.new_empty(q.shape[2], k.shape[2], dtype=torch.bool),
)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: BlockMask | None) -> None:
    """Raise ValueError where the arguments of `attention` do not fit each other."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        raise ValueError(f"{shapes}: must be (B, H, M, D), (B, H, N, D), (B, H, N, D)")
    if min(q.shape) < 1 or k.shape[2] < 1:
        raise ValueError(f"{shapes}: every size must be at least 1")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: must be one")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale = {scale}: must be positive")
    if mask is not None and mask.shape != (q.shape[2], k.shape[2]):
        raise ValueError(f"{shapes}: the mask is for {mask.shape[0]} queries and {mask.shape[1]} keys")
    if mask is not None and mask.queries.blocks.device != q.device:
        raise ValueError(f"q is on {q.device}, the mask on {mask.queries.blocks.device}: use mask.to(...)")


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that PyTorch's own attention would cast it to under autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: BlockMask | None) -> Tensor:
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    seen = _dense_op(q, k, *flatten(mask))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    # What a query without a key gets differs between SDPA's kernels.
    return out.masked_fill(~seen.any(dim=1)[:, None], 0.0)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    mask: BlockMask | None = ...,
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
    mask: BlockMask | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: BlockMask | None = None,
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
        mask: which blocks of queries meet which blocks of keys, see `block_mask`: clips packed one after the
            other, block-causal frames, windows. The same for all heads and the whole batch. All else is left
            out of the work too. A query that meets no key gives 0, its log-sum-exp is -∞.
        return_lse: also return the log-sum-exp, natural, (B, H, M) in fp32 or better; it has a gradient too.
        backend: "triton" is the kernel of this package, for fp16, bf16, fp32 and head dims 32, 40 … 128;
            "sdpa" is PyTorch's, which computes all that a mask leaves out; "reference" stores the scores.
            "auto" goes by the table of measurements, `tiles.CHOICES`; where it is silent, dense calls on a
            GPU are PyTorch's and masked ones ours. On a CPU it is PyTorch's. The log says who serves.
    Returns: out (B, H, M, D), or (out, lse).
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    check(q, k, v, scale, mask)
    chosen = serving(backend, q, k.shape[2], mask is not None, return_lse)
    if chosen == "sdpa":
        return _sdpa(q, k, v, scale, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "triton":
        out, lse = _forward_op(q, k, v, scale, *flatten(mask))
    else:
        seen = None if mask is None else _dense_op(q, k, *flatten(mask))
        out, lse = reference.attention_with_lse(q, k, v, scale, seen)
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
