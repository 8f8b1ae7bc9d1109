"""The forward kernel of attention, softmax(scale·q·kᵀ)·v, in Triton.

A program owns a block of queries and meets blocks of keys. Whenever the running maximum of the scores grows,
what was summed so far is scaled down. Beside the output it leaves lse = ln Σ exp(s), s = scale·q·kᵀ; a query
that meets no key has output 0 and lse -∞. Exponentials are powers of two, with log₂e folded into the scale.
Source: Dao, FlashAttention-2, arXiv 2307.08691.

Shapes: B batch, H heads, M queries, N keys, D width of a head. See `rows` for the names in a kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from collections.abc import Iterator

from torch import Tensor

from dtrain.kernels import attention_launch
from dtrain.kernels.attention_launch import SIZES, Pass, empty_like, empty_lse, readable
from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.launch import AotCase, tl, triton
from dtrain.kernels.rows import dot_add, dot_rows, listed, load_rows, owned, source, store_rows, zeros
from dtrain.kernels.tiles import Tile

__all__ = ["PASSES", "aot_cases", "forward"]

_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _step(
    q, q_tail, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn, start, n_end,
    scale, top, total, acc, acc_tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running maximum, its sum and the weighted values."""
    k, k_tail = load_rows(
        k_src, k_src_tail, start, n_end, stride_kn, D, MAIN, TAIL, UNIT, BLOCK_N, MASKED, TMA
    )
    s = dot_rows(q, q_tail, k, k_tail, TAIL, PRECISION)
    if MASKED:
        s = tl.where((start + tl.arange(0, BLOCK_N) < n_end)[None, :], s, float("-inf"))
    # Finite: every walk begins with a key, although a later tile of a partial block may hold none.
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    decay = tl.exp2(top - new)
    acc *= decay[:, None]
    if TAIL > 0:
        acc_tail *= decay[:, None]
    v, v_tail = load_rows(
        v_src, v_src_tail, start, n_end, stride_vn, D, MAIN, TAIL, UNIT, BLOCK_N, MASKED, TMA
    )
    acc, acc_tail = dot_add(p, v, v_tail, acc, acc_tail, TAIL, PRECISION)
    return new, total * decay + tl.sum(p, 1), acc, acc_tail


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    Q, K, V, OUT, LSE, BLOCKS, ENTRIES,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n_blocks, H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_M: tl.constexpr, SUB_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_b, i_h, first, m_end, lo, mid, hi = owned(BLOCKS, n_blocks, H, M, N, BLOCK_M, SUB_M, BLOCK_N, SUB_N)
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    k_src, k_src_tail = source(p_k, N, stride_kn, D, MAIN, TAIL, UNIT, BLOCK_N, TMA)
    v_src, v_src_tail = source(p_v, N, stride_vn, D, MAIN, TAIL, UNIT, BLOCK_N, TMA)
    q, q_tail = load_rows(p_q, p_q, first, m_end, stride_qn, D, MAIN, TAIL, UNIT, BLOCK_M, True, False)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, acc_tail = zeros(BLOCK_M, MAIN, TAIL)
    STEP: tl.constexpr = BLOCK_N if BLOCKS is None else 1
    for i in range(lo, mid, STEP):
        start, n_end = listed(ENTRIES, i, N, BLOCK_N, SUB_N)
        top, total, acc, acc_tail = _step(
            q, q_tail, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn, start, n_end,
            scale, top, total, acc, acc_tail, D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, False, TMA,
        )  # fmt: skip
    for i in tl.range(mid, hi, STEP, num_stages=1):
        start, n_end = listed(ENTRIES, i, N, BLOCK_N, SUB_N)
        top, total, acc, acc_tail = _step(
            q, q_tail, k_src, k_src_tail, v_src, v_src_tail, stride_kn, stride_vn, start, n_end,
            scale, top, total, acc, acc_tail, D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, True, TMA,
        )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total) if BLOCKS is not None else total
    p_out = OUT + (i_b * M * H + i_h) * D
    store_rows(
        p_out, first, m_end, H * D, acc / some[:, None], acc_tail / some[:, None],
        D, MAIN, TAIL, BLOCK_M,
    )  # fmt: skip
    o_m = first + tl.arange(0, BLOCK_M)
    lse = (top + tl.log2(some)) * _LN2
    tl.store(LSE + (i_b * H + i_h) * M + o_m, lse, mask=o_m < m_end)


_FORWARD = Pass("forward", _kernel, "queries", ("Q", "K", "V", "OUT", "LSE"), ("Q", "K", "V"))
PASSES = (_FORWARD,)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: BlockMask | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, H, M, D) and lse (B, H, M), natural, fp32.

    For inputs that `attention` has checked and `refusal` lets pass.

    Args:
        tile: instead of the table's.
    """
    q, k, v = readable(q), readable(k), readable(v)
    out, lse = empty_like(q), empty_lse(q)
    _FORWARD.launch(q, k, scale, mask, {"Q": q, "K": k, "V": v, "OUT": out, "LSE": lse}, tile)
    return out, lse


def aot_cases() -> Iterator[AotCase]:
    """See `aot`."""
    return attention_launch.cases(PASSES)
