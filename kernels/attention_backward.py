"""The backward kernels of attention in Triton, in two forms.

Every probability is formed again, p = exp(s - lse), and

    dv = pᵀ·dout        ds = p ∘ (dout·vᵀ - δ)        dq = scale·ds·k        dk = scale·dsᵀ·q

where δ = Σ dout ∘ out - dlse, row by row.

split   dq has a program for each block of queries, dk and dv have one for each block of keys. No two add to
        the same place: a run repeats bit by bit, for seven matrix products.
fused   a program for each block of keys makes all three, five products, and adds its share of dq to a sum in
        fp32, in no fixed order: runs differ by rounding.

Source: Dao, FlashAttention-2, arXiv 2307.08691.

Shapes: B batch, H heads, M queries, N keys, D width of a head. See `rows` for the names in a kernel; G is the
gradient of the output, SUM the one of the queries in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from dtrain.kernels import attention_launch
from dtrain.kernels.attention_launch import SIZES, Pass, empty_like, empty_lse, readable
from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.launch import AotCase, tl, triton
from dtrain.kernels.rows import (
    add_rows,
    dot_add,
    dot_rows,
    listed,
    load_rows,
    owned,
    source,
    store_rows,
    zeros,
)
from dtrain.kernels.tiles import Tile

__all__ = ["PASSES", "Form", "aot_cases", "backward"]

Form = Literal["split", "fused"]

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _delta(
    p_g, p_o, p_dlse, first, m_end, stride_gn, stride_on,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """δ of rows, and their gradient of the output."""
    g, g_tail = load_rows(p_g, p_g, first, m_end, stride_gn, D, MAIN, TAIL, UNIT, BLOCK_M, True, False)
    out, out_tail = load_rows(p_o, p_o, first, m_end, stride_on, D, MAIN, TAIL, UNIT, BLOCK_M, True, False)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(g_tail.to(tl.float32) * out_tail.to(tl.float32), 1)
    if p_dlse is not None:
        o_m = first + tl.arange(0, BLOCK_M)
        delta -= tl.load(p_dlse + o_m, mask=o_m < m_end, other=0.0)
    return delta, g, g_tail


@triton.jit
def _dq_step(
    q, q_tail, g, g_tail, lse, delta, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn,
    start, n_end, scale, dq, dq_tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of one block of keys, without the scale."""
    k, k_tail = load_rows(
        k_src, k_src_tail, start, n_end, stride_kn, D, MAIN, TAIL, UNIT, BLOCK_N, MASKED, TMA
    )
    v, v_tail = load_rows(
        v_src, v_src_tail, start, n_end, stride_vn, D, MAIN, TAIL, UNIT, BLOCK_N, MASKED, TMA
    )
    p = tl.exp2(dot_rows(q, q_tail, k, k_tail, TAIL, PRECISION) * scale - lse[:, None])
    if MASKED:  # exp(0 - lse) may be infinite
        p = tl.where((start + tl.arange(0, BLOCK_N) < n_end)[None, :], p, 0.0)
    dp = dot_rows(g, g_tail, v, v_tail, TAIL, PRECISION)
    return dot_add(p * (dp - delta[:, None]), k, k_tail, dq, dq_tail, TAIL, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _dq_kernel(
    Q, K, V, OUT, G, LSE, DLSE, DELTA, DQ, BLOCKS, ENTRIES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    n_blocks, H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_M: tl.constexpr, SUB_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq, and δ for `_key_kernel`."""
    i_b, i_h, first, m_end, lo, mid, hi = owned(BLOCKS, n_blocks, H, M, N, BLOCK_M, SUB_M, BLOCK_N, SUB_N)
    i_bh = i_b * H + i_h
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    k_src, k_src_tail = source(p_k, N, stride_kn, D, MAIN, TAIL, UNIT, BLOCK_N, TMA)
    v_src, v_src_tail = source(p_v, N, stride_vn, D, MAIN, TAIL, UNIT, BLOCK_N, TMA)
    delta, g, g_tail = _delta(
        G + (i_b * stride_gb + i_h * stride_gh) * UNIT, OUT + (i_b * stride_ob + i_h * stride_oh) * UNIT,
        DLSE + i_bh * M if DLSE is not None else None, first, m_end, stride_gn, stride_on,
        D, MAIN, TAIL, UNIT, BLOCK_M,
    )  # fmt: skip
    o_m = first + tl.arange(0, BLOCK_M)
    tl.store(DELTA + i_bh * M + o_m, delta, mask=o_m < m_end)
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    q, q_tail = load_rows(p_q, p_q, first, m_end, stride_qn, D, MAIN, TAIL, UNIT, BLOCK_M, True, False)
    lse = tl.load(LSE + i_bh * M + o_m, mask=o_m < m_end, other=0.0) * _LOG2E
    dq, dq_tail = zeros(BLOCK_M, MAIN, TAIL)
    STEP: tl.constexpr = BLOCK_N if BLOCKS is None else 1
    for i in range(lo, mid, STEP):
        start, n_end = listed(ENTRIES, i, N, BLOCK_N, SUB_N)
        dq, dq_tail = _dq_step(
            q, q_tail, g, g_tail, lse, delta, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn,
            start, n_end, scale, dq, dq_tail, D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, False, TMA,
        )  # fmt: skip
    for i in tl.range(mid, hi, STEP, num_stages=1):
        start, n_end = listed(ENTRIES, i, N, BLOCK_N, SUB_N)
        dq, dq_tail = _dq_step(
            q, q_tail, g, g_tail, lse, delta, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn,
            start, n_end, scale, dq, dq_tail, D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, True, TMA,
        )  # fmt: skip
    factor = scale * _LN2
    p_dq = DQ + (i_b * M * H + i_h) * D
    store_rows(p_dq, first, m_end, H * D, dq * factor, dq_tail * factor, D, MAIN, TAIL, BLOCK_M)


@triton.jit(do_not_specialize=SIZES)
def _delta_kernel(
    OUT, G, DLSE, DELTA, SUM, BLOCKS, ENTRIES,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    n_blocks, H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_M: tl.constexpr, SUB_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """δ for the fused `_key_kernel`, and a zero for each of its sums."""
    i_b, i_h, first, m_end, _, _, _ = owned(BLOCKS, n_blocks, H, M, N, BLOCK_M, SUB_M, BLOCK_N, SUB_N)
    i_bh = i_b * H + i_h
    delta, _, _ = _delta(
        G + (i_b * stride_gb + i_h * stride_gh) * UNIT, OUT + (i_b * stride_ob + i_h * stride_oh) * UNIT,
        DLSE + i_bh * M if DLSE is not None else None, first, m_end, stride_gn, stride_on,
        D, MAIN, TAIL, UNIT, BLOCK_M,
    )  # fmt: skip
    o_m = first + tl.arange(0, BLOCK_M)
    tl.store(DELTA + i_bh * M + o_m, delta, mask=o_m < m_end)
    nothing, nothing_tail = zeros(BLOCK_M, MAIN, TAIL)
    p_sum = SUM + (i_b * M * H + i_h) * D
    store_rows(p_sum, first, m_end, H * D, nothing, nothing_tail, D, MAIN, TAIL, BLOCK_M)


@triton.jit
def _key_step(
    k, k_tail, v, v_tail, p_lse, p_delta, q_src, q_src_tail, g_src, g_src_tail, sum_dst, sum_dst_tail,
    stride_qn, stride_gn, stride_sn, start, m_end, first, n_end, scale, dk, dk_tail, dv, dv_tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """dk, without the scale, and dv of one block of queries; FUSED adds dq to the sums as well.

    The scores are formed transposed, (N, M), so that p and ds multiply without being turned.
    """
    q, q_tail = load_rows(
        q_src, q_src_tail, start, m_end, stride_qn, D, MAIN, TAIL, UNIT, BLOCK_M, MASKED, TMA
    )
    g, g_tail = load_rows(
        g_src, g_src_tail, start, m_end, stride_gn, D, MAIN, TAIL, UNIT, BLOCK_M, MASKED, TMA
    )
    o_m = start + tl.arange(0, BLOCK_M)
    if MASKED:  # past the last row g and δ are zero, so that p may be anything finite
        lse = tl.load(p_lse + o_m, mask=o_m < m_end, other=0.0)
        delta = tl.load(p_delta + o_m, mask=o_m < m_end, other=0.0)
    else:
        lse = tl.load(p_lse + o_m)
        delta = tl.load(p_delta + o_m)
    p = tl.exp2(dot_rows(k, k_tail, q, q_tail, TAIL, PRECISION) * scale - (lse * _LOG2E)[None, :])
    if FUSED:  # of a key that is not there exp(0 - lse) may be infinite, and all keys add to dq
        p = tl.where((first + tl.arange(0, BLOCK_N) < n_end)[:, None], p, 0.0)
    dv, dv_tail = dot_add(p, g, g_tail, dv, dv_tail, TAIL, PRECISION)
    ds = p * (dot_rows(v, v_tail, g, g_tail, TAIL, PRECISION) - delta[None, :])
    dk, dk_tail = dot_add(ds, q, q_tail, dk, dk_tail, TAIL, PRECISION)
    if FUSED:
        dq, dq_tail = zeros(BLOCK_M, MAIN, TAIL)
        dq, dq_tail = dot_add(tl.trans(ds.to(k.dtype)), k, k_tail, dq, dq_tail, TAIL, PRECISION)
        add_rows(
            sum_dst, sum_dst_tail, start, m_end, stride_sn, dq, dq_tail,
            D, MAIN, TAIL, BLOCK_M, MASKED, TMA,
        )  # fmt: skip
    return dk, dk_tail, dv, dv_tail


@triton.jit(do_not_specialize=SIZES)
def _key_kernel(
    Q, K, V, G, LSE, DELTA, DK, DV, SUM, BLOCKS, ENTRIES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_wb, stride_wh, stride_wn,
    n_blocks, H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_M: tl.constexpr, SUB_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv, whose strides are W's; with SUM, dq as well."""
    FUSED: tl.constexpr = SUM is not None
    i_b, i_h, first, n_end, lo, _, hi = owned(BLOCKS, n_blocks, H, N, M, BLOCK_N, SUB_N, BLOCK_M, SUB_M)
    i_bh = i_b * H + i_h
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    p_g = G + (i_b * stride_gb + i_h * stride_gh) * UNIT
    q_src, q_src_tail = source(p_q, M, stride_qn, D, MAIN, TAIL, UNIT, BLOCK_M, TMA)
    g_src, g_src_tail = source(p_g, M, stride_gn, D, MAIN, TAIL, UNIT, BLOCK_M, TMA)
    sum_dst = q_src
    sum_dst_tail = q_src_tail
    if FUSED:
        p_sum = SUM + (i_b * M * H + i_h) * D
        sum_dst, sum_dst_tail = source(p_sum, M, H * D, D, MAIN, TAIL, 1, BLOCK_M, TMA)
    k, k_tail = load_rows(p_k, p_k, first, n_end, stride_kn, D, MAIN, TAIL, UNIT, BLOCK_N, True, False)
    v, v_tail = load_rows(p_v, p_v, first, n_end, stride_vn, D, MAIN, TAIL, UNIT, BLOCK_N, True, False)
    dk, dk_tail = zeros(BLOCK_N, MAIN, TAIL)
    dv, dv_tail = zeros(BLOCK_N, MAIN, TAIL)
    STEP: tl.constexpr = BLOCK_M if BLOCKS is None else 1
    for i in range(lo, hi, STEP):
        start, m_end = listed(ENTRIES, i, M, BLOCK_M, SUB_M)
        dk, dk_tail, dv, dv_tail = _key_step(
            k, k_tail, v, v_tail, LSE + i_bh * M, DELTA + i_bh * M, q_src, q_src_tail, g_src, g_src_tail,
            sum_dst, sum_dst_tail, stride_qn, stride_gn, H * D, start, m_end, first, n_end, scale,
            dk, dk_tail, dv, dv_tail, D, MAIN, TAIL, UNIT, PRECISION, BLOCK_M, BLOCK_N, True, TMA, FUSED,
        )  # fmt: skip
    factor = scale * _LN2
    p_dk = DK + (i_b * N * H + i_h) * D
    store_rows(p_dk, first, n_end, H * D, dk * factor, dk_tail * factor, D, MAIN, TAIL, BLOCK_N)
    p_dv = DV + (i_b * stride_wb + i_h * stride_wh) * UNIT
    store_rows(p_dv, first, n_end, stride_wn * UNIT, dv, dv_tail, D, MAIN, TAIL, BLOCK_N)


_DQ = Pass(
    "backward_dq", _dq_kernel, "queries",
    ("Q", "K", "V", "OUT", "G", "LSE", "DLSE", "DELTA", "DQ"), ("Q", "K", "V", "OUT", "G"),
)  # fmt: skip
_DELTA = Pass("backward_dq", _delta_kernel, "queries", ("OUT", "G", "DLSE", "DELTA", "SUM"), ("OUT", "G"))
_BY_KEYS = ("Q", "K", "V", "G", "LSE", "DELTA", "DK", "DV", "SUM")
_DKDV = Pass("backward_dkdv", _key_kernel, "keys", _BY_KEYS, ("Q", "K", "V", "G", "DV"), absent=("SUM",))
_FUSED = Pass("backward_fused", _key_kernel, "keys", _BY_KEYS, ("Q", "K", "V", "G", "DV"))
PASSES = (_DQ, _DKDV, _FUSED)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: BlockMask | None = None,
    form: Form = "split",
    dv: Tensor | None = None,
    tiles: Mapping[str, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, from the gradients of out and lse and what `forward` was given and gave.

    Args:
        form: see the module.
        dv: (B, H, N, D) with contiguous rows to write dv to, such as a slice of a packed gradient.
        tiles: by the passes' names, instead of the table's.
    """
    q, k, v, out, grad_out = (readable(x) for x in (q, k, v, out, grad_out))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    tiles = tiles or {}
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v) if dv is None else dv
    tensors: dict[str, Tensor | None] = {
        "Q": q, "K": k, "V": v, "OUT": out, "G": grad_out, "LSE": lse, "DLSE": grad_lse,
        "DELTA": empty_lse(q), "DQ": dq, "DK": dk, "DV": dv, "SUM": None,
    }  # fmt: skip
    if form == "split":
        _DQ.launch(q, k, scale, mask, tensors, tiles.get(_DQ.name))  # leaves DELTA
        _DKDV.launch(q, k, scale, mask, tensors, tiles.get(_DKDV.name))
    else:
        tensors["SUM"] = total = empty_like(q, torch.float32)
        _DELTA.launch(q, k, scale, mask, tensors)
        _FUSED.launch(q, k, scale, mask, tensors, tiles.get(_FUSED.name))
        torch.mul(total, scale, out=dq)
    return dq, dk, dv


def aot_cases() -> Iterator[AotCase]:
    """See `aot`."""
    return attention_launch.cases(PASSES)
