"""The norm and the rotation of queries and keys as an operator of PyTorch: packed qkv in, q, k and v out.

    q = rotation(rms_norm(q_packed))        k = rotation(rms_norm(k_packed))        v = v_packed

One pass each way. The values come along so that the backward writes one packed gradient, rather than three
that PyTorch would have to join: for attention backends that want q, k and v apart. `attention_layer` leaves
them where they are.

The pass is bound by memory. With u = B·N·H·D elements, forwards reads 3u and writes 3u (2u and 2u without the
values); backwards reads 5u, the three gradients, queries and keys, and writes 3u (4u and 2u).

Shapes: B batch, N tokens, H heads, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import qk_norm_rope_kernels as kernels
from dtrain.kernels import reference
from dtrain.kernels.op import Operator
from dtrain.kernels.qk_norm_rope_kernels import NormRope
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = [
    "NormRope", "qk_norm_rope", "check", "forward_bytes", "backward_bytes",
    "empty_heads", "fake_weights", "of_given", "or_nothing", "reference_backward",
]  # fmt: skip


def forward_bytes(
    batch: int, tokens: int, heads: int, head_dim: int, itemsize: int = 2, values: bool = True
) -> int:
    """Bytes that the forward pass moves to and from memory, angles included, with or without the values."""
    return _bytes(6 if values else 4, batch, tokens, heads, head_dim, itemsize)


def backward_bytes(
    batch: int, tokens: int, heads: int, head_dim: int, itemsize: int = 2, values: bool = True
) -> int:
    """Bytes that the backward pass moves, with norms; with or without the gradient of the values."""
    return _bytes(8 if values else 6, batch, tokens, heads, head_dim, itemsize)


def _bytes(units: int, batch: int, tokens: int, heads: int, head_dim: int, itemsize: int) -> int:
    angles = 2 * tokens * (head_dim // 2) * 4
    return units * batch * tokens * heads * head_dim * itemsize + angles


def empty_heads(qkv: Tensor) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D), for the heads of a packed qkv."""
    batch, tokens, _, heads, width = qkv.shape
    return qkv.new_empty(batch, tokens, heads, width).transpose(1, 2)


def or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or a tensor without elements: operators return no None."""
    return like.new_empty(0) if x is None else x


def _forward_kernel(qkv: Tensor, *how: Any) -> tuple[Tensor, ...]:
    outputs = [empty_heads(qkv) for _ in range(3)]
    kernels.forward(qkv, NormRope(*how), [y.transpose(1, 2) for y in outputs])
    return tuple(outputs)


def _forward_cpu(qkv: Tensor, *how: Any) -> tuple[Tensor, ...]:
    if not kernels.refusal(qkv.device, qkv.dtype, qkv.shape[-1]):  # Triton's interpreter
        return _forward_kernel(qkv, *how)
    return tuple(empty_heads(qkv).copy_(y) for y in reference.qk_norm_rope(qkv, *how))


def _empty_packed(grad: Tensor) -> Tensor:
    batch, heads, tokens, width = grad.shape
    return grad.new_empty(batch, tokens, 3, heads, width)


def _backward_kernel(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor | None, *how: Any
) -> tuple[Tensor, ...]:
    grad_qkv = _empty_packed(grad_q)
    grads = [g.transpose(1, 2) for g in (grad_q, grad_k, grad_v)]
    weights = kernels.backward(grads, qkv, NormRope(*how), grad_qkv)
    return grad_qkv, *(or_nothing(w, grad_qkv) for w in weights)


def _backward_cpu(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor | None, *how: Any
) -> tuple[Tensor, ...]:
    if not kernels.refusal(grad_q.device, grad_q.dtype, grad_q.shape[-1]):
        return _backward_kernel(grad_q, grad_k, grad_v, qkv, *how)
    grad_qkv = _empty_packed(grad_q)
    weights = reference_backward(grad_q, grad_k, qkv, NormRope(*how), grad_qkv)
    grad_qkv[:, :, 2] = grad_v.transpose(1, 2)
    return grad_qkv, *weights


def reference_backward(
    grad_q: Tensor, grad_k: Tensor, qkv: Tensor | None, how: NormRope, grad_qkv: Tensor
) -> list[Tensor]:
    """Write the gradients by queries and keys to their slots; returns those by the weights, if any."""
    grads_of_weights = []
    for slot, (grad, weight) in enumerate(((grad_q, how.q_weight), (grad_k, how.k_weight))):
        x = grad if qkv is None else qkv[:, :, slot].transpose(1, 2)
        grad, grad_weight = reference.norm_rope_backward(grad, x, weight, *how[2:])
        grad_qkv[:, :, slot] = grad.transpose(1, 2)
        grads_of_weights.append(or_nothing(grad_weight, grad_qkv))
    return grads_of_weights


def _backward_fake(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor | None, *how: Any) -> Any:
    grad_qkv = _empty_packed(grad_q)
    return grad_qkv, *fake_weights(NormRope(*how), grad_qkv)


def fake_weights(how: NormRope, like: Tensor) -> list[Tensor]:
    """Gradients of the weights without their values, see `or_nothing`."""
    return [or_nothing(None if w is None else torch.empty_like(w), like) for w in how[:2]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, *how = inputs
    ctx.eps = how[-1]
    ctx.save_for_backward(qkv if NormRope(*how).norms else None, *how[:-1])


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    qkv, *tensors = ctx.saved_tensors
    how = [*tensors, ctx.eps]
    grad_qkv, *of_weights = _backward(*grads, qkv, *how)
    return grad_qkv, *of_given(NormRope(*how), of_weights), None, None, None


def of_given(how: NormRope, grads_of_weights: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the weights, None where there is no weight."""
    return [None if w is None else grad for w, grad in zip(how[:2], grads_of_weights, strict=True)]


_HOW = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps"

_forward = Operator(
    f"dtrain::qk_norm_rope(Tensor qkv, {_HOW}) -> (Tensor q, Tensor k, Tensor v)",
    cpu=_forward_cpu,
    cuda=_forward_kernel,
    fake=lambda qkv, *how: tuple(empty_heads(qkv) for _ in range(3)),
    save=_save,
    backward=_differentiate,
)
_backward = Operator(
    f"dtrain::qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? qkv, {_HOW})"
    " -> (Tensor grad_qkv, Tensor grad_q_weight, Tensor grad_k_weight)",
    cpu=_backward_cpu,
    cuda=_backward_kernel,
    fake=_backward_fake,
)


def check(qkv: Tensor, how: NormRope) -> None:
    """Compare what is given to each other.

    Raises:
        ValueError: a shape does not fit, or the angles are too coarse or ask for a gradient.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or min(qkv.shape) < 1:
        raise ValueError(f"qkv {tuple(qkv.shape)}: must be (B, N, 3, H, D), every size at least 1")
    tokens, width = qkv.shape[1], qkv.shape[4]
    for name, weight in (("q_weight", how.q_weight), ("k_weight", how.k_weight)):
        if weight is not None and weight.shape != (width,):
            raise ValueError(f"{name} {tuple(weight.shape)}: must be ({width},), the width of a head")
    if (how.cos is None) != (how.sin is None):
        raise ValueError("cos and sin: must be given both, or neither")
    for name, table in (("cos", how.cos), ("sin", how.sin)):
        if table is not None:
            _check_table(name, table, tokens, width)


def _check_table(name: str, table: Tensor, tokens: int, width: int) -> None:
    if width % 2 or table.shape != (tokens, width // 2):
        raise ValueError(
            f"{name} {tuple(table.shape)}: must be (N, D/2), here ({tokens}, {width}/2) with an even D"
        )
    if table.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {table.dtype}: must be float32, 16 bits round the angles")
    if table.requires_grad:
        raise ValueError(f"{name} requires a gradient: none is formed for angles; pass {name}.detach()")


def qk_norm_rope(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a packed qkv, normed over each head and rotated, and its values; differentiable.

    Args:
        qkv: (B, N, 3, H, D), every size at least 1; strides as they come, rows contiguous.
        q_weight, k_weight: (D,) of an RMS norm in any dtype; None leaves queries or keys as they are.
        cos, sin: (N, D/2) in fp32, which rotate the pairs (i, i + D/2), see `reference.rope_angles`; no
            gradient. None rotates nothing.
        eps: of the norms.
        backend: "triton" is the kernel, "reference" a few passes of PyTorch. "auto" is the kernel on a GPU.
    Returns: q, k, v (B, H, N, D) in qkv's dtype. With nothing to do, or by the reference, views of qkv.
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    how = NormRope(q_weight, k_weight, cos, sin, eps)
    check(qkv, how)
    if not how.changes or not _fused(backend, qkv.device, qkv.dtype, qkv.shape[-1]):
        return reference.qk_norm_rope(qkv, *how)
    q, k, v = _forward(qkv, *how)
    return q, k, v


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fused(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    refusal = kernels.refusal(device, dtype, head_dim)
    return kernels_serve(
        backend, device, refusal, "norm and rotation of queries and keys take several passes"
    )
