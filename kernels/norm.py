"""Residual sum, gate, norm and modulation as operators of PyTorch, each one pass over memory both ways.

    s = x + gate ∘ branch      n = (s - mean)·r, or s·r with "rms"      y = (n ∘ w + b) ∘ (1 + scale) + shift

Everything is formed in fp32 and rounded once, y from s before its rounding. The backward keeps s, which is
the residual stream and kept anyhow, mean and r of each row, and the branch where there is a gate. Where there
is none, the gradients by x and branch are one tensor.

The passes are bound by memory. With u = B·N·D elements of one size, `add_norm` reads 2u and writes 2u;
backwards it reads 3u, which are s and the gradients by s and y, and writes u. A gate adds 2u, the branch and
its gradient. `norm` reads u and writes u; backwards it reads 2u and writes u.

Shapes: B samples, N rows of each, D width; x, branch, s, y (B, ..., D); w, b (D,); gate, scale, shift (B, D).
"""

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.kernels import norm_kernels as kernels
from dtrain.kernels import norm_reference as reference
from dtrain.kernels.norm_reference import Kind, Norm
from dtrain.kernels.op import Operator

__all__ = ["add_norm", "backward_bytes", "forward_bytes", "gated_add", "norm"]

_log = logging.getLogger(__name__)


def forward_bytes(
    rows: int,
    width: int,
    itemsize: int = 2,
    branch_itemsize: int = 2,
    *,
    add: bool = True,
    kind: Kind = "layer",
    affine: int = 2,
    gated: int = 0,
    modulated: int = 0,
) -> int:
    """Bytes that the forward pass moves to and from memory.

    Args:
        rows, width: B·N and D.
        itemsize: bytes of a number of x, s, weight and bias.
        branch_itemsize: bytes of a number of branch, y, gate, scale and shift.
        add: whether there is a branch.
        affine: how many of weight and bias there are, in this order: 0, 1 or 2.
        gated, modulated: samples, B, that have a gate, and that have scale and shift; 0 without.
    """
    row = (2 if add else 1) * (itemsize + branch_itemsize) * width + _statistics_bytes(kind)
    return rows * row + width * (affine * itemsize + (gated + 2 * modulated) * branch_itemsize)


def backward_bytes(
    rows: int,
    width: int,
    itemsize: int = 2,
    branch_itemsize: int = 2,
    *,
    add: bool = True,
    kind: Kind = "layer",
    affine: int = 2,
    gated: int = 0,
    modulated: int = 0,
) -> int:
    """Bytes that the backward pass moves, but for the sums that programs leave to the second kernel.

    Args: see `forward_bytes`.
    """
    apart = 2 if gated else int(add and itemsize != branch_itemsize)  # the branch, and its own gradient
    row = (3 if add else 2) * itemsize + (1 + apart) * branch_itemsize
    read = affine if modulated else min(affine, 1)  # the bias is for the gradient by scale
    vectors = (affine + read) * itemsize + (2 * gated + 3 * modulated) * branch_itemsize
    return rows * (row * width + _statistics_bytes(kind)) + width * vectors


def _statistics_bytes(kind: Kind) -> int:
    return 8 if kind == "layer" else 4


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


def _fill(out: Tensor, value: Tensor) -> Tensor:
    """An output's values, unless it is nothing: never the input itself."""
    return out.copy_(value) if out.numel() else out


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

_forward = Operator(
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
_add = Operator(
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


Backend = Literal["auto", "triton", "reference"]


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: Kind = "layer",
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """(n ∘ weight + bias) ∘ (1 + scale) + shift, with n = x normed over its last dim; differentiable.

    Args:
        x: (..., D), any strides. With scale or shift its first dim is that of samples, (B, ..., D).
        weight, bias: (D,) in any dtype, or None; a bias is for "layer" only.
        kind: "layer" takes off the mean of a row and divides by its deviation; "rms" divides by the root of
            its mean square.
        eps: added under the root.
        scale, shift: of each sample, (B, D) or (B, 1, D), or None; chunks of a (B, 6D) projection are read
            where they are.
        dtype: of the output; x's by default, under autocast as well.
        backend: "triton" is the kernel, "reference" plain PyTorch. "auto" is the kernel on a GPU.
    Returns: (..., D), contiguous.
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    how, _ = _checked(x, None, Norm(weight, bias, scale, shift, kind, eps), None)
    dtype = x.dtype if dtype is None else dtype
    if not _served(backend, dtype, x, how.weight, how.bias, how.scale, how.shift):
        return reference.norm(x, how, dtype)
    y: Tensor = _forward(x, None, None, *how, dtype)[1]
    return y


def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    kind: Kind = "layer",
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """s = x + gate ∘ branch, and `norm` of s before its rounding; differentiable.

    Args:
        x: as for `norm`.
        branch: of x's shape, any strides and dtype.
        gate: of each sample, (B, D) or (B, 1, D); None is one.
        dtype: of y; that of s by default.
        weight, bias, kind, eps, scale, shift, backend: as for `norm`.
    Returns: s in the dtype of `x + branch`, and y; both of x's shape, contiguous.
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    how, gate = _checked(x, branch, Norm(weight, bias, scale, shift, kind, eps), gate)
    dtype = torch.promote_types(x.dtype, branch.dtype) if dtype is None else dtype
    if not _served(backend, dtype, x, branch, gate, how.weight, how.bias, how.scale, how.shift):
        return reference.add_norm(x, branch, gate, how, dtype)
    s, y, _, _ = _forward(x, branch, gate, *how, dtype)
    return s, y


def gated_add(x: Tensor, branch: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """x + gate ∘ branch; differentiable.

    Args: see `add_norm`.
    Returns: of x's shape, contiguous, in the dtype of `x + branch`.
    Raises:
        ValueError: the shapes do not fit, or the chosen backend cannot serve.
    """
    _, row = _checked(x, branch, Norm(), gate)
    assert row is not None
    if not _served(backend, x.dtype, x, branch, row):
        return reference.add(x, branch, row)
    s: Tensor = _add(x, branch, row)
    return s


def _checked(x: Tensor, branch: Tensor | None, how: Norm, gate: Tensor | None) -> tuple[Norm, Tensor | None]:
    """The same, with what samples have of their own as (B, D)."""
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x {tuple(x.shape)}: must be (..., D), with D at least 1")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch {tuple(branch.shape)}: must have the shape of x, {tuple(x.shape)}")
    if how.kind not in ("layer", "rms"):
        raise ValueError(f"kind = {how.kind!r}: must be 'layer' or 'rms'")
    if how.kind == "rms" and how.bias is not None:
        raise ValueError("bias: kind = 'rms' has none; use shift, or kind = 'layer'")
    for name, vector in (("weight", how.weight), ("bias", how.bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} {tuple(vector.shape)}: must be ({x.shape[-1]},), the width of x")
    scale, shift = _of_samples("scale", how.scale, x), _of_samples("shift", how.shift, x)
    return how._replace(scale=scale, shift=shift), _of_samples("gate", gate, x)


def _of_samples(name: str, vector: Tensor | None, x: Tensor) -> Tensor | None:
    if vector is None:
        return None
    row = vector.squeeze(1) if vector.dim() == 3 else vector
    if x.dim() < 2 or row.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(
            f"{name} {tuple(vector.shape)}: must be (B, D) or (B, 1, D), by the first and last dim of x "
            f"{tuple(x.shape)}"
        )
    return row


def _served(backend: Backend, dtype: torch.dtype, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels serve. What has no rows is nothing to them."""
    dtypes = tuple(sorted({dtype, x.dtype, *(y.dtype for y in others if y is not None)}, key=str))
    return _fused(backend, x.device, dtypes, x.shape[-1]) and x.numel() > 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fused(backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> bool:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    return _decided(backend, device, dtypes, width)


@functools.cache
def _decided(backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> bool:
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend = {backend!r}: must be one of 'auto', 'triton', 'reference'")
    refusal = kernels.refusal(device, dtypes, width)
    if backend == "triton" and refusal:
        raise ValueError(f"backend = 'triton': {refusal}; backend = 'auto' finds one that serves")
    if backend == "auto" and refusal and device.type == "cuda":
        _log.warning("norms take several passes: %s", refusal)
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and not refusal)
