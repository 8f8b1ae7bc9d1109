"""Attention and its gradients in fp64, a slice of queries at a time: the truth at any length.

    s = scale·q·kᵀ, -∞ where not allowed    p = softmax(s)    out = p·v
    dv = pᵀ·g    ds = p ∘ (g·vᵀ - Σ g ∘ out)    dq = scale·ds·k    dk = scale·dsᵀ·q

A query that may see no key has output 0. Memory is that of one slice of scores, not of all M·N.

Shapes: B batch, H heads, M queries, N keys, D width of a head; leading dims are kept as they come.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["exact_attention", "forward", "gradients"]

_SLICE_BYTES = 2**29  # of one slice of scores


def exact_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√D)·v in fp64, differentiable once; q (..., M, D), k and v (..., N, D), allowed (M, N)."""
    out: Tensor = _Exact.apply(q, k, v, allowed)
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (..., M, D) and the log-sum-exp of the scores (..., M), both in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for rows in _slices(q, k):
        scores = _scores(q[..., rows, :], k, None if allowed is None else allowed[rows])
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = scores.softmax(-1).nan_to_num(0.0) @ v
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in fp64, from the gradient of the output (..., M, D)."""
    grad, q, k, v = (x.double() for x in (grad, q, k, v))
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _slices(q, k):
        q_rows, g_rows = q[..., rows, :], grad[..., rows, :]
        p = _scores(q_rows, k, None if allowed is None else allowed[rows]).softmax(-1).nan_to_num(0.0)
        dv += p.mT @ g_rows
        delta = (g_rows * (p @ v)).sum(-1, keepdim=True)
        ds = p.mul_((g_rows @ v.mT).sub_(delta)).mul_(scale)
        dq[..., rows, :] = ds @ k
        dk += ds.mT @ q_rows
    return dq, dk, dv


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, allowed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, allowed)
        return forward(q, k, v, allowed)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, allowed = ctx.saved_tensors
        return *gradients(grad, q, k, v, allowed), None


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
    return scores if allowed is None else scores.masked_fill_(~allowed, -math.inf)


def _slices(q: Tensor, k: Tensor) -> Iterator[slice]:
    queries = q.shape[-2]
    row_bytes = 8 * k.shape[:-1].numel()
    step = max(1, _SLICE_BYTES // row_bytes)
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))
