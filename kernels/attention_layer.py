"""What stands between the qkv projection and the output projection of a layer, as one operator.

    out = attention(rotation(rms_norm(q)), rotation(rms_norm(k)), v)          q, k, v packed in qkv

For its backward pass it keeps qkv, out and the log-sum-exps, 4u elements for u = B·N·H·D, where its parts one
after the other keep normed and rotated queries and keys, and the values, as well: 7u. The backward pass forms
those queries and keys again, one pass over memory beside five or seven matrix products, and writes every
gradient to its slot of one packed tensor: nothing is joined.

Shapes: B batch, N tokens, H heads, D width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from dtrain.kernels import attention as core
from dtrain.kernels import attention_backward, attention_forward, reference
from dtrain.kernels import qk_norm_rope as parts
from dtrain.kernels import qk_norm_rope_kernels as kernels
from dtrain.kernels.attention import attention
from dtrain.kernels.attention_choice import Backend, backward_form, serving
from dtrain.kernels.attention_launch import empty_lse, readable, refusal
from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.op import Operator
from dtrain.kernels.qk_norm_rope import NormRope

__all__ = ["qkv_attention"]


class _Options(NamedTuple):
    """What the operators take beside tensors of tokens."""

    how: NormRope
    scale: float
    mask: BlockMask | None


def _options(flat: Sequence[Any], qkv: Tensor) -> _Options:
    tokens = qkv.select(2, 0).transpose(1, 2)
    return _Options(NormRope(*flat[:5]), flat[5], core.unflatten(flat[6:], tokens, tokens))


def _split(qkv: Tensor, how: NormRope) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D): queries and keys side by side in new memory, unless nothing is done to them."""
    batch, tokens, _, heads, width = qkv.shape
    q, k, v = qkv.unbind(2)
    if how.changes:
        q, k = qkv.new_empty(batch, tokens, 2, heads, width).unbind(2)
        kernels.forward(qkv, how, [q, k])
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _forward_kernel(qkv: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    how, scale, mask = _options(flat, qkv)
    out, lse = attention_forward.forward(*_split(readable(qkv), how), scale, mask)
    return out.transpose(1, 2), lse


def _forward_cpu(qkv: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    if not refusal(qkv.device, qkv.dtype, qkv.shape[-1]):  # Triton's interpreter
        return _forward_kernel(qkv, *flat)
    how, scale, mask = _options(flat, qkv)
    seen = mask.dense() if mask else None
    out, lse = reference.attention_with_lse(*reference.qk_norm_rope(qkv, *how), scale, seen)
    return out.transpose(1, 2).contiguous(), lse


def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.select(2, 0).shape)
    return out, empty_lse(out.transpose(1, 2))


def _backward_kernel(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    how, scale, mask = _options(flat, qkv)
    qkv = readable(qkv)
    q, k, v = _split(qkv, how)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    form = backward_form(q.device, q.shape[-1], q.shape[2], mask is not None)
    dv = grad_qkv[:, :, 2].transpose(1, 2)
    dq, dk, _ = attention_backward.backward(
        grad_out, grad_lse, q, k, v, out, lse, scale, mask, form=form, dv=dv
    )
    of_weights = kernels.backward([dq.transpose(1, 2), dk.transpose(1, 2)], qkv, how, grad_qkv)
    return grad_qkv, *(parts.or_nothing(w, grad_qkv) for w in of_weights)


def _backward_cpu(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    if not refusal(qkv.device, qkv.dtype, qkv.shape[-1]):
        return _backward_kernel(grad_out, grad_lse, qkv, out, lse, *flat)
    how, scale, mask = _options(flat, qkv)
    seen = mask.dense() if mask else None
    split = reference.qk_norm_rope(qkv, *how)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    dq, dk, dv = reference.attention_backward(grad_out, grad_lse, *split, out, lse, scale, seen)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_qkv[:, :, 2] = dv.transpose(1, 2)
    return grad_qkv, *parts.reference_backward(dq, dk, qkv, how, grad_qkv)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad_qkv, *parts.fake_weights(NormRope(*flat[:5]), qkv)


def _heads_first(packed: Any) -> tuple[int, int, int, int]:
    batch, tokens, _, heads, width = packed
    return batch, heads, tokens, width


def _forward_flops(qkv: Any, *flat: Any, **_: Any) -> int:
    shape = _heads_first(qkv)
    return core.computed_flops(int(sdpa_flop_count(shape, shape, shape)), shape, shape, flat[-1])


def _backward_flops(grad_out: Any, grad_lse: Any, qkv: Any, *flat: Any, **_: Any) -> int:
    # As PyTorch counts its own: five products, although the split form does seven.
    shape = _heads_first(qkv)
    return core.computed_flops(
        int(sdpa_backward_flop_count(shape, shape, shape, shape)), shape, shape, flat[-1]
    )


# In `flat` the tensors stand at 0 … 3 and, those of the mask, at 6 … 9.
def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *flat = inputs
    ctx.numbers = flat[4:6], flat[10:]
    ctx.save_for_backward(qkv, *output, *flat[:4], *flat[6:10])
    ctx.set_materialize_grads(False)  # the log-sum-exps have none


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, *tensors = ctx.saved_tensors
    flat = [*tensors[:4], *ctx.numbers[0], *tensors[4:], *ctx.numbers[1]]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_qkv, *of_weights = _backward(grad_out, grad_lse, qkv, out, lse, *flat)
    return grad_qkv, *parts.of_given(NormRope(*flat[:5]), of_weights), *[None] * (len(flat) - 2)


_FLAT = f"Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, float scale, {core.MASK}"

_backward = Operator(
    "dtrain::qkv_attention_backward("
    f"Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, {_FLAT})"
    " -> (Tensor grad_qkv, Tensor grad_q_weight, Tensor grad_k_weight)",
    cpu=_backward_cpu,
    cuda=_backward_kernel,
    fake=_backward_fake,
    flops=_backward_flops,
)
_forward = Operator(
    f"dtrain::qkv_attention_forward(Tensor qkv, {_FLAT}) -> (Tensor out, Tensor lse)",
    cpu=_forward_cpu,
    cuda=_forward_kernel,
    fake=_forward_fake,
    flops=_forward_flops,
    save=_save,
    backward=_differentiate,
)


def qkv_attention(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    mask: BlockMask | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of a packed qkv to itself, its queries and keys normed and rotated first; differentiable.

    Args:
        qkv: (B, N, 3, H, D), every size at least 1; strides as they come, rows contiguous.
        q_weight, k_weight: (D,) of an RMS norm in any dtype; None leaves queries or keys as they are.
        cos, sin: (N, D/2) in fp32, which rotate the pairs (i, i + D/2), see `reference.rope_angles`; no
            gradient. None rotates nothing.
        eps: of the norms.
        scale, mask: as in `attention.attention`.
        backend: as in `attention.attention`. With "triton" all of it is one operator; "reference" is plain
            PyTorch throughout.
    Returns: (B, N, H·D), the heads joined.
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    how = NormRope(q_weight, k_weight, cos, sin, eps)
    parts.check(qkv, how)
    cast = core.as_autocast(qkv)
    q, k, v = cast.permute(2, 0, 3, 1, 4).unbind(0)
    if serving(backend, q, qkv.shape[1], mask is not None) != "triton":
        split = parts.qk_norm_rope(
            qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, eps=eps,
            backend="reference" if backend == "reference" else "auto",
        )  # fmt: skip
        return attention(*split, scale=scale, mask=mask, backend=backend).transpose(1, 2).flatten(2)
    core.check(q, k, v, scale, mask)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _forward(cast, *how, scale, *core.flatten(mask))[0]
    return out.flatten(2)
