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

import torch
from torch import Tensor

from dtrain.kernels import norm_operators as operators
from dtrain.kernels import norm_reference as reference
from dtrain.kernels.norm_launch import refusal
from dtrain.kernels.norm_reference import Kind, Norm
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = ["add_norm", "backward_bytes", "forward_bytes", "gated_add", "norm"]


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
    y: Tensor = operators.norm(x, None, None, *how, dtype)[1]
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
    s, y, _, _ = operators.norm(x, branch, gate, *how, dtype)
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
    s: Tensor = operators.gated_add(x, branch, row)
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
    return kernels_serve(backend, device, refusal(device, dtypes, width), "norms take several passes")
