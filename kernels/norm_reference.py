"""Residual sum, gate, norm and modulation in eager PyTorch: what the fused norm is held against.

    s = x + gate ∘ branch      n = (s - mean)·r, or s·r with "rms"      y = (n ∘ w + b) ∘ (1 + scale) + shift

with r = 1/√(var + eps), or 1/√(mean(s²) + eps), over each row. In fp32 or better, with one rounding for each
output; y is formed from s before its rounding. Without gate, scale and shift, and in one dtype, they are
PyTorch's own two calls: models on a CPU keep their bits.

Sources: Ba et al., arXiv 1607.06450; Zhang & Sennrich, arXiv 1910.07467; Peebles & Xie, arXiv 2212.09748.

Shapes: B samples, D width; x, branch, s, y (B, ..., D); w, b (D,); gate, scale, shift (B, D).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Gradients", "Kind", "Norm", "add", "add_norm", "backward", "gate_backward",
    "modulated", "norm", "normed", "summed", "wide",
]  # fmt: skip

Kind = Literal["layer", "rms"]


class Norm(NamedTuple):
    """What is done to each row.

    Args:
        weight, bias: (D,) or None; a bias is for "layer" only.
        scale, shift: (B, D) or None.
        kind: "layer" takes off the mean of a row, "rms" does not.
        eps: added under the root.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    kind: Kind = "layer"
    eps: float = 1e-5


def wide(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where there is such a tensor."""
    doubles = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if doubles else torch.float32


def norm(x: Tensor, how: Norm, dtype: torch.dtype | None = None) -> Tensor:
    """y of x, in `dtype`, by default that of x."""
    dtype = dtype or x.dtype
    if _is_plain(how, x.dtype):
        return _plain(x, how).to(dtype)
    return modulated(normed(x.to(wide(x)), how)[0], how).to(dtype)


def add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """s, in the dtype of `x + branch`."""
    if gate is None:
        return x + branch
    return summed(x, branch, gate).to(torch.promote_types(x.dtype, branch.dtype))


def add_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, how: Norm, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """s, in the dtype of `x + branch`, and its y in `dtype`, by default that of s."""
    s_dtype = torch.promote_types(x.dtype, branch.dtype)
    dtype = dtype or s_dtype
    if gate is None and _is_plain(how, s_dtype):
        s = x + branch
        return s, _plain(s, how).to(dtype)
    s = summed(x, branch, gate)
    return s.to(s_dtype), modulated(normed(s, how)[0], how).to(dtype)


def _is_plain(how: Norm, dtype: torch.dtype) -> bool:
    """Whether PyTorch has one call for it."""
    one_dtype = all(v is None or v.dtype == dtype for v in (how.weight, how.bias))
    return how.scale is None and how.shift is None and one_dtype


def _plain(s: Tensor, how: Norm) -> Tensor:
    if how.kind == "rms":
        return F.rms_norm(s, s.shape[-1:], how.weight, how.eps)
    return F.layer_norm(s, s.shape[-1:], how.weight, how.bias, how.eps)


def summed(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """s before its rounding."""
    dtype = wide(x, branch)
    addend = branch.to(dtype)
    if gate is not None:
        addend = _over_rows(gate.to(dtype), x) * addend
    return x.to(dtype) + addend


def _over_rows(vector: Tensor, x: Tensor) -> Tensor:
    """(B, D) as (B, 1, ..., D), for all rows of each sample of x."""
    return vector.view(vector.shape[0], *[1] * (x.dim() - 2), vector.shape[-1])


def normed(s: Tensor, how: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """n, and mean and r (B, ...), in s's dtype; with "rms" the mean is empty."""
    if how.kind == "rms":
        mean, centred = s.new_empty(0), s
    else:
        mean = s.mean(-1)
        centred = s - mean[..., None]
    r = (centred.square().mean(-1) + how.eps).rsqrt()
    return centred * r[..., None], mean, r


def modulated(n: Tensor, how: Norm) -> Tensor:
    """y before its rounding."""
    y = n if how.weight is None else n * how.weight.to(n.dtype)
    y = y if how.bias is None else y + how.bias.to(n.dtype)
    y = y if how.scale is None else y * (1 + _over_rows(how.scale.to(n.dtype), n))
    return y if how.shift is None else y + _over_rows(how.shift.to(n.dtype), n)


class Gradients(NamedTuple):
    """By s and by the vectors that were given, in fp32 or better; None for the others."""

    s: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def backward(
    grad_s: Tensor | None, grad_y: Tensor, s: Tensor, mean: Tensor, r: Tensor, how: Norm
) -> Gradients:
    """From the gradients by s, where it went on, and by y.

    With g = grad_y ∘ (1 + scale) and dn = g ∘ w:  ds = grad_s + r·(dn - mean(dn) - n·mean(dn ∘ n)), for "rms"
    without mean(dn); dw = Σ g ∘ n and db = Σ g over all rows; over the rows of each sample
    dscale = Σ grad_y ∘ (n ∘ w + b) and dshift = Σ grad_y.

    Args:
        mean, r: of s, see `normed`.
    """
    dtype = wide(s)
    s, dy = s.to(dtype), grad_y.to(dtype)
    n = (s if how.kind == "rms" else s - mean[..., None]) * r[..., None]
    g = dy if how.scale is None else dy * (1 + _over_rows(how.scale.to(dtype), s))
    dn = g if how.weight is None else g * how.weight.to(dtype)
    ds = dn - n * (dn * n).mean(-1, keepdim=True)
    ds = r[..., None] * (ds if how.kind == "rms" else ds - dn.mean(-1, keepdim=True))
    ds = ds if grad_s is None else ds + grad_s.to(dtype)
    return Gradients(
        ds,
        None if how.weight is None else _over_all(g * n),
        None if how.bias is None else _over_all(g),
        None if how.scale is None else _over_samples(dy * modulated(n, how._replace(scale=None, shift=None))),
        None if how.shift is None else _over_samples(dy),
    )


def gate_backward(ds: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by branch and gate, in fp32 or better: gate ∘ ds, and Σ ds ∘ branch over a sample's rows."""
    dtype = wide(ds)
    ds = ds.to(dtype)
    return _over_rows(gate.to(dtype), ds) * ds, _over_samples(ds * branch.to(dtype))


def _over_all(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)


def _over_samples(x: Tensor) -> Tensor:
    return x.flatten(1, -2).sum(1) if x.dim() > 2 else x
