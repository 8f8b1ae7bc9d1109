"""Who serves a call of attention, and by which form of the backward: by the table of measurements, said once.

Ours, or PyTorch's scaled_dot_product_attention where that was measured to be faster. Where nothing was
measured, a dense call on a GPU is PyTorch's, and one with a block mask is ours: PyTorch's computes all that
the mask leaves out. On a CPU it is PyTorch's, or the reference where a log-sum-exp is wanted.
"""

import functools
import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.kernels.attention_backward import Form
from dtrain.kernels.attention_launch import refusal
from dtrain.kernels.launch import arch_of, on_gpu
from dtrain.kernels.tiles import choice, key_steps

__all__ = ["Backend", "backward_form", "serving"]

Backend = Literal["auto", "triton", "sdpa", "reference"]

_log = logging.getLogger(__name__)


def serving(wanted: Backend, x: Tensor, keys: int, sparse: bool = False, return_lse: bool = False) -> Backend:
    """Which backend `attention` takes for heads (..., D) as x, and says so the first time.

    Args:
        sparse: whether there is a mask.
    Raises:
        ValueError: the one that is wanted cannot serve.
    """
    # Lengths that the table does not tell apart share a compiled graph.
    steps = _key_steps(x.device, x.shape[-1], sparse)
    bucket = next((step for step in steps if keys <= step), math.inf)
    chosen: Backend = _choose(wanted, x.device, x.dtype, x.shape[-1], sparse, return_lse, bucket)
    return chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_steps(device: torch.device, head_dim: int, sparse: bool) -> tuple[int, ...]:
    return key_steps(arch_of(device), head_dim, sparse) if on_gpu(device) else ()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(wanted: Backend, device: torch.device, dtype: torch.dtype, *call: Any) -> Backend:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    return _chosen(arch_of(device) if on_gpu(device) else "", wanted, device, dtype, *call)


@functools.cache
def _chosen(
    arch: str,
    wanted: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    sparse: bool,
    return_lse: bool,
    keys: float,
) -> Backend:
    refusals: dict[Backend, str] = {
        "triton": refusal(device, dtype, head_dim),
        "sdpa": "sdpa returns no log-sum-exp" if return_lse else "",
        "reference": "",
    }
    if wanted not in (*refusals, "auto"):
        raise ValueError(f"backend = {wanted!r}: must be one of 'auto', {str([*refusals])[1:-1]}")
    if refusals.get(wanted):
        raise ValueError(f"backend = {wanted!r}: {refusals[wanted]}; backend = 'auto' finds one that serves")
    order, why = _preference(arch, head_dim, keys, sparse) if wanted == "auto" else ([wanted], "asked for")
    chosen = next(name for name in order if not refusals[name])
    _say(arch or device.type, dtype, head_dim, sparse, chosen, refusals[order[0]] or why)
    return chosen


def _preference(arch: str, head_dim: int, keys: float, sparse: bool) -> tuple[list[Backend], str]:
    """Backends, the best first, and why."""
    if not arch:
        return ["sdpa", "reference"], "not on a GPU"
    row = choice(arch, head_dim, keys, sparse)
    why = f"{'measured' if row else 'nothing measured'} on {arch}"
    ours = row.backend == "triton" if row else sparse
    return (["triton", "sdpa", "reference"] if ours else ["sdpa", "triton", "reference"]), why


@functools.cache
def _say(device: str, dtype: torch.dtype, head_dim: int, sparse: bool, chosen: Backend, why: str) -> None:
    what = "block-sparse attention" if sparse else "attention"
    _log.info("%s on %s, %s, head dim %d: %s (%s)", what, device, dtype, head_dim, chosen, why)


def backward_form(device: torch.device, head_dim: int, keys: int, sparse: bool) -> Form:
    """The form of our backward: split where runs must repeat or nothing was measured."""
    row = choice(arch_of(device), head_dim, keys, sparse)
    return "split" if row is None or torch.are_deterministic_algorithms_enabled() else row.backward
