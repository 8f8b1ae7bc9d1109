"""The fused norm as operators of PyTorch: `norm` of a sum or of x alone, and a gated sum without a norm.

One operator serves both norms: without a branch it gives no s, which then has no elements. The backward keeps
s (x without a branch), mean and r of each row, and the branch where there is a gate.

Shapes: B samples, D width; x, branch, s, y (B, ..., D); weight, bias (D,); gate, scale, shift (B, D).
"""

from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import norm_launch as kernels
from dtrain.kernels import norm_reference as reference
from dtrain.kernels.norm_reference import Norm
from dtrain.kernels.op import Operator

__all__ = ["gated_add", "norm"]


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _nothing(like: Tensor) -> Tensor:
    """Stands where there is no output: operators return no None."""
    return like.new_empty(0)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return _nothing(like) if x is None else x


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _outputs(
    x: Tensor, branch: Tensor | None, how: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, y, mean and r without their values."""
    s = _nothing(x) if branch is None else _empty(x, torch.promote_types(x.dtype, branch.dtype))
    rows = x.new_empty(x.shape[:-1], dtype=reference.wide(x))
    mean = _nothing(rows) if how.kind == "rms" else torch.empty_like(rows)
    return s, _empty(x, dtype), mean, rows


def _forward_kernel(x: Tensor, branch: Tensor | None, gate: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    how, dtype = Norm(*flat[:-1]), flat[-1]
    outputs = _outputs(x, branch, how, dtype)
    kernels.forward(x, branch, gate, how, *map(_or_none, outputs))
    return outputs


def _forward_cpu(x: Tensor, branch: Tensor | None, gate: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    if _interpreted(x, branch, gate, *flat[:4]):
        return _forward_kernel(x, branch, gate, *flat)
    how, dtype = Norm(*flat[:-1]), flat[-1]
    s = x.to(reference.wide(x)) if branch is None else reference.summed(x, branch, gate)
    n, mean, r = reference.normed(s, how)
    found = (s, reference.modulated(n, how), mean, r)
    return tuple(_fill(out, value) for out, value in zip(_outputs(x, branch, how, dtype), found, strict=True))


def _fill(out: Tensor, value: Tensor | None) -> Tensor:
    """An output with its values, unless it is nothing."""
    return out if value is None or not out.numel() else out.copy_(value)


def _interpreted(*tensors: Tensor | None) -> bool:
    """Whether Triton's interpreter runs the kernels."""
    given = [x for x in tensors if x is not None]
    return not kernels.refusal(given[0].device, [x.dtype for x in given], given[0].shape[-1])


def _backward_kernel(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    mean: Tensor,
    r: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, ...]:
    how, (x_dtype, branch_dtype) = Norm(*flat[:6]), flat[6:]
    dx, dbranch = _empty(s, x_dtype), None if branch_dtype is None else _empty(s, branch_dtype)
    vectors = kernels.backward(grad_s, grad_y, s, mean, r, branch, gate, how, dx, dbranch)
    return dx, *(_or_nothing(x, s) for x in (dbranch, *vectors))


def _backward_cpu(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    mean: Tensor,
    r: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, ...]:
    if _interpreted(s, grad_y, grad_s, branch, gate, *flat[:4]):
        return _backward_kernel(grad_y, grad_s, s, mean, r, branch, gate, *flat)
    how = Norm(*flat[:6])
    ds, *of_vectors = reference.backward(grad_s, grad_y, s, mean, r, how)
    dbranch, dgate = ds, None
    if branch is not None and gate is not None:
        dbranch, dgate = reference.gate_backward(ds, branch, gate)
    outputs = _backward_fake(grad_y, grad_s, s, mean, r, branch, gate, *flat)
    return tuple(map(_fill, outputs, (ds, dbranch, *of_vectors, dgate)))


def _backward_fake(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    mean: Tensor,
    r: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, ...]:
    x_dtype, branch_dtype = flat[6:]
    dbranch = None if branch_dtype is None else _empty(s, branch_dtype)
    vectors = (None if v is None else _empty(v) for v in (*flat[:4], gate))
    return _empty(s, x_dtype), *(_or_nothing(x, s) for x in (dbranch, *vectors))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, *how = inputs[:-1]
    s, _, mean, r = output
    ctx.kind, ctx.eps = how[4:]
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.save_for_backward(
        x if branch is None else s, mean, r, branch if gate is not None else None, gate, *how[:4]
    )
    ctx.mark_non_differentiable(mean, r)
    ctx.set_materialize_grads(False)  # s or y may lead nowhere


def _differentiate(
    ctx: Any, grad_s: Tensor | None, grad_y: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    s, mean, r, branch, gate, *vectors = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    if branch_dtype is None:  # there is no s
        grad_s = None
    of_vectors: list[Tensor | None] = [None] * 4
    if grad_y is None:
        dx, dbranch, dgate = _differentiate_sum(grad_s, branch, gate, x_dtype, branch_dtype)
    else:
        own = branch_dtype if gate is not None or branch_dtype != x_dtype else None
        dx, dbranch, *found = _backward(
            grad_y, grad_s, s, mean, r, branch, gate, *vectors, ctx.kind, ctx.eps, x_dtype, own
        )
        *of_vectors, dgate = (None if v is None else g for v, g in zip((*vectors, gate), found, strict=True))
        if own is None:  # one tensor for both
            dbranch = None if branch_dtype is None else dx
    return dx, dbranch, dgate, *of_vectors, None, None, None


def _differentiate_sum(
    grad: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x + gate ∘ branch alone, by x, branch and gate."""
    if grad is None:
        return None, None, None
    if gate is None:
        return grad.to(x_dtype), grad.to(branch_dtype), None
    return grad.to(x_dtype), *_add_backward(grad, branch, gate)


def _add_kernel(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    s = _add_fake(x, branch, gate)
    kernels.forward(x, branch, gate, None, s, None, None, None)
    return s


def _add_cpu(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    if _interpreted(x, branch, gate):
        return _add_kernel(x, branch, gate)
    return _add_fake(x, branch, gate).copy_(reference.summed(x, branch, gate))


def _add_fake(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _empty(x, torch.promote_types(x.dtype, branch.dtype))


def _add_backward_kernel(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dbranch = _empty(branch)
    dgate = kernels.backward(grad, None, None, None, None, branch, gate, None, None, dbranch)[-1]
    assert dgate is not None
    return dbranch, dgate


def _add_backward_cpu(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if _interpreted(grad, branch, gate):
        return _add_backward_kernel(grad, branch, gate)
    dbranch, dgate = reference.gate_backward(grad, branch, gate)
    return _empty(branch).copy_(dbranch), _empty(gate).copy_(dgate)


def _add_save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*inputs[1:])


def _add_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate = ctx.saved_tensors
    return _differentiate_sum(grad, branch, gate, ctx.dtype, branch.dtype)


_HOW = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, str kind, float eps"

norm = Operator(
    f"dtrain::norm(Tensor x, Tensor? branch, Tensor? gate, {_HOW}, ScalarType dtype)"
    " -> (Tensor s, Tensor y, Tensor mean, Tensor r)",
    cpu=_forward_cpu,
    cuda=_forward_kernel,
    fake=lambda x, branch, gate, *flat: _outputs(x, branch, Norm(*flat[:-1]), flat[-1]),
    save=_save,
    backward=_differentiate,
)
_backward = Operator(
    "dtrain::norm_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor mean, Tensor r, Tensor? branch,"
    f" Tensor? gate, {_HOW}, ScalarType x_dtype, ScalarType? branch_dtype) -> (Tensor dx, Tensor dbranch,"
    " Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift, Tensor dgate)",
    cpu=_backward_cpu,
    cuda=_backward_kernel,
    fake=_backward_fake,
)
gated_add = Operator(
    "dtrain::gated_add(Tensor x, Tensor branch, Tensor gate) -> Tensor",
    cpu=_add_cpu,
    cuda=_add_kernel,
    fake=_add_fake,
    save=_add_save,
    backward=_add_differentiate,
)
_add_backward = Operator(
    "dtrain::gated_add_backward(Tensor grad, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)",
    cpu=_add_backward_cpu,
    cuda=_add_backward_kernel,
    fake=lambda grad, branch, gate: (_empty(branch), _empty(gate)),
)
