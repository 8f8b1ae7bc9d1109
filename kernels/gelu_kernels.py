"""GELU of a hidden layer and its way back, one pass over memory each.

With the halves a = |x| and q(a) = 1 - Φ(a), an even function decides all:

    gelu(x)  = max(x, 0) - a·q(a)
    gelu'(x) = d for x < 0, else 1 - d,      d = q(a) - a·φ(a),  φ = -q'

Exact: q(a) = p(t)·exp(-a²/2)/2 with t = 1/(1 + 0.3275911·a/√2) and p a polynomial of degree 5, at most 7e-8
from the truth. It shares its exponential with the density φ, so that both together cost one exp2 and one
reciprocal. By tanh: q(a) = 1/(1 + exp(2u)), φ = 2·u'·q·(1 - q), u(a) = √(2/π)·(a + 0.044715·a³).

Beyond a = 16 either q is zero in fp32. So a is cut off there, and infinities get their limits, where PyTorch
gives NaN; NaN stays NaN. Sources: Hendrycks & Gimpel, arXiv 1606.08415; Abramowitz & Stegun, 7.1.26.

Backwards, dact becomes dpre in place and the activation is made again, for the gradient of the weight behind
it. A program owns some rows and columns; it sums the bias' gradient over its rows in registers, and the
programs' sums are added in a fixed order: a run repeats bit by bit.

Shapes: R rows, H hidden width. In a kernel: o_ offsets, m_ mask, p_ pointer; G gradient of ACT, which becomes
that of PRE.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, known_arch, tl, triton

__all__ = ["aot_cases", "backward", "forward", "partial_sums", "refusal"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _tail(a, TANH: tl.constexpr):
    """q(a) and φ(a) for a in [0, 16]."""
    if TANH:
        e = tl.exp2(a * (-2.302208198 - 0.1029432397 * (a * a)))  # -2·√(2/π)/ln 2, and 0.044715 of it
        r = 1.0 / (1.0 + e)
        q = e * r
        slope = q * r * (1.595769122 + 0.2140644488 * (a * a))
    else:
        t = 1.0 / (1.0 + 0.23164190 * a)
        e = tl.exp2(a * a * -0.7213475204)  # -1/(2·ln 2)
        p = 0.530702715 * t - 0.7265760135
        p = p * t + 0.7107068705
        p = p * t - 0.142248368
        p = p * t + 0.127414796
        q = p * t * e
        slope = 0.3989422804 * e
    return q, slope


@triton.jit
def _input(pre, BIAS, bias):
    """x in fp32, and |x| up to 16. A comparison rather than a minimum: it lets NaN pass."""
    x = pre.to(tl.float32)
    if BIAS is not None:
        x += bias
    a = tl.abs(x)
    return x, tl.where(a > 16.0, 16.0, a)


@triton.jit
def _bias(BIAS, o_c, m_c):
    """(1, C) in fp32; of no bias, a zero."""
    bias = tl.zeros([1, 1], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return bias


@triton.jit
def _columns(H, COLS: tl.constexpr):
    """Of this program: which block of rows, and its columns."""
    blocks = tl.cdiv(H, COLS)
    o_c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    return tl.program_id(0) // blocks, o_c, o_c < H


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(PRE, BIAS, ACT, R, H, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ACT may be PRE."""
    i_rows, o_c, m_c = _columns(H, COLS)
    o_r = i_rows * ROWS + tl.arange(0, ROWS)
    mask = (o_r < R)[:, None] & m_c[None, :]
    o_x = (o_r.to(tl.int64) * H)[:, None] + o_c[None, :]
    x, a = _input(tl.load(PRE + o_x, mask=mask, other=0.0), BIAS, _bias(BIAS, o_c, m_c))
    q, _ = _tail(a, TANH)
    tl.store(ACT + o_x, (tl.maximum(x, 0.0) - a * q).to(ACT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    G, PRE, BIAS, ACT, SUMS, R, H,
    TANH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """G is overwritten. ACT may be PRE, or None; SUMS (blocks of rows, H) fp32 may be None."""
    i_rows, o_c, m_c = _columns(H, COLS)
    bias = _bias(BIAS, o_c, m_c)
    total = tl.zeros([ROWS, COLS], tl.float32)
    first = i_rows * (ROWS * STEPS)
    for start in range(first, tl.minimum(first + ROWS * STEPS, R), ROWS):
        o_r = start + tl.arange(0, ROWS)
        mask = (o_r < R)[:, None] & m_c[None, :]
        o_x = (o_r.to(tl.int64) * H)[:, None] + o_c[None, :]
        # Both loads come before the first store, beyond which the compiler may not move them.
        grad = tl.load(G + o_x, mask=mask, other=0.0).to(tl.float32)
        x, a = _input(tl.load(PRE + o_x, mask=mask, other=0.0), BIAS, bias)
        q, slope = _tail(a, TANH)
        d = q - a * slope
        grad *= tl.where(x < 0.0, d, 1.0 - d)
        tl.store(G + o_x, grad.to(G.dtype.element_ty), mask=mask)
        if ACT is not None:
            tl.store(ACT + o_x, (tl.maximum(x, 0.0) - a * q).to(ACT.dtype.element_ty), mask=mask)
        if SUMS is not None:
            total += grad
    if SUMS is not None:
        tl.store(SUMS + i_rows.to(tl.int64) * H + o_c, tl.sum(total, 0), mask=m_c)


# Not timed. A thread has 2 vectors of 8 at a time forwards and, to save registers, 1 of each tensor
# backwards. There a program takes STEPS times as many rows, so that its sums of the bias' gradient, 4 bytes
# each, are few. No kernel spills, by `dtrain.kernels.aot` with Triton 3.6 and 3.9.
_WARPS, _COLS, _STEPS = 4, 256, 16
_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": True}
_ROWS = {arch: _WARPS * (64 if arch.startswith("gfx") else 32) * 8 // _COLS for arch in SHARED_BYTES}


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    if dtype not in _DTYPES:
        return f"{dtype} is none of float16, bfloat16 and float32"
    return ""


def _forward_constants(arch: str, approximate: str) -> dict[str, Any]:
    return {"TANH": approximate == "tanh", "ROWS": 2 * _ROWS[known_arch(arch)], "COLS": _COLS}


def _backward_constants(arch: str, approximate: str) -> dict[str, Any]:
    rows = _ROWS[known_arch(arch)]
    return {"TANH": approximate == "tanh", "ROWS": rows, "STEPS": _STEPS, "COLS": _COLS}


def partial_sums(rows: int, arch: str) -> int:
    """How many sums of the bias' gradient a backward pass over so many rows writes for each column."""
    return -(-rows // (_ROWS[known_arch(arch)] * _STEPS))


def forward(pre: Tensor, bias: Tensor | None, approximate: str, act: Tensor) -> None:
    """act ← gelu(pre + bias), computed in fp32 and rounded once.

    Args:
        pre: (R, H), contiguous, of a dtype that `refusal` lets pass.
        bias: (H,) in any dtype.
        approximate: "none" or "tanh".
        act: (R, H), contiguous; may be `pre`.
    """
    rows, width = pre.shape
    constants = _forward_constants(arch_of(pre.device), approximate)
    grid = -(-rows // constants["ROWS"]) * -(-width // _COLS)
    if grid:
        with torch.cuda.device_of(pre):
            _forward_kernel[(grid,)](pre, _contiguous(bias), act, rows, width, **constants, **_OPTIONS)


def backward(
    grad: Tensor, pre: Tensor, bias: Tensor | None, approximate: str, act: Tensor | None, sums: bool
) -> Tensor | None:
    """grad ← grad ∘ gelu'(pre + bias) and act ← gelu(pre + bias), in one pass.

    Args:
        grad, pre: (R, H), contiguous, of dtypes that `refusal` lets pass.
        bias, approximate: as in `forward`.
        act: (R, H), contiguous; may be `pre`; None writes none.
        sums: whether the bias' gradient is wanted.
    Returns: the bias' gradient (H,) in fp32, of what was not yet rounded; None unless wanted.
    """
    rows, width = pre.shape
    arch = arch_of(pre.device)
    blocks = partial_sums(rows, arch)
    partial = pre.new_empty(blocks, width, dtype=torch.float32) if sums else None
    grid = blocks * -(-width // _COLS)
    if grid:
        with torch.cuda.device_of(pre):
            _backward_kernel[(grid,)](
                grad, pre, _contiguous(bias), act, partial, rows, width,
                **_backward_constants(arch, approximate), **_OPTIONS,
            )  # fmt: skip
    return None if partial is None else partial.sum(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def aot_cases() -> Iterator[AotCase]:
    """Both passes in bf16, exact and by tanh, and exact with an fp32 bias; no width is compiled in."""
    for arch in SHARED_BYTES:
        for approximate, bias in (("none", "bf16"), ("tanh", "bf16"), ("none", "fp32")):
            what = "tanh" if approximate == "tanh" else "exact"
            what += " with fp32 bias" if bias == "fp32" else ""
            forward, backward = _forward_constants(arch, approximate), _backward_constants(arch, approximate)
            yield _case(f"gelu.forward {what}", _forward_kernel, arch, forward, bias)
            yield _case(f"gelu.backward {what}", _backward_kernel, arch, backward, bias)


def _case(name: str, kernel: Any, arch: str, constants: dict[str, Any], bias: str) -> AotCase:
    types = {"BIAS": f"*{bias}", "SUMS": "*fp32", "R": "i32", "H": "i32"}
    signature = {x: types.get(x, "*bf16") for x in kernel.arg_names if x not in constants}
    return AotCase(
        name=name,
        kernel=kernel,
        arch=arch,
        signature=signature,
        constexprs=constants,
        divisible=tuple(x for x in signature if x != "R"),
        options=_OPTIONS,
        tensor_cores=False,
    )
