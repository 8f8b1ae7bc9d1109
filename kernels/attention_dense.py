"""The kernels of attention between all queries and all keys, softmax(scale·q·kᵀ)·v, in Triton.

Forward: a program owns a block of queries and walks the keys. Whenever the running maximum of the scores
grows, what was summed so far is scaled down. Beside the output it leaves lse = ln Σ exp(s), s = scale·q·kᵀ.
Backward: every probability is formed again, p = exp(s - lse), and

    dv = pᵀ·dout        ds = p ∘ (dout·vᵀ - δ)        dq = scale·ds·k        dk = scale·dsᵀ·q

where δ = Σ dout ∘ out - dlse, row by row. dq has a program for each block of queries, dk and dv have one for
each block of keys. No two add to the same place: a run repeats bit by bit, for two matrix products more.
Source: Dao, FlashAttention-2, arXiv 2307.08691.

Exponentials are powers of two, with log₂e folded into the scale. Blocks are powers of two wide: a head dim is
a main part, which needs no mask, and a tail: 72 = 64 + 16 with half of the tail masked. Strides count UNIT
elements, 8 where they allow it: Triton then knows that rows start at 16 bytes, which wide loads need, even
for D = 72, and compiles nothing anew when sizes change.

Shapes: B batch, H heads, M queries, N keys, D width of a head. In a kernel: i_ index, o_ offsets, m_ mask,
p_ pointer; G the gradient of the output.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, tl, triton
from dtrain.kernels.tiles import Tile, tiles

__all__ = ["HEAD_DIMS", "aot_cases", "backward", "empty_like", "empty_lse", "forward", "refusal"]

HEAD_DIMS = range(32, 129, 8)

# fp32 is served everywhere rather than tuned: three products of tf32 for each keep all in memory twice.
_FP32_TILE = Tile(block_m=32, block_n=32, num_warps=4, num_stages=1)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
_SIZES = [f"stride_{x}{axis}" for x in "qkvog" for axis in "bhn"] + ["H", "M", "N"]


@triton.jit
def _place(tokens, H, BLOCK: tl.constexpr):
    """Batch, head and rows of this program; all blocks of a head run side by side."""
    blocks = tl.cdiv(tokens, BLOCK)
    i_bh = tl.program_id(0) // blocks
    o_row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), o_row


@triton.jit
def _load(
    p, o_row, rows, stride,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of a head as (R, MAIN) and (R, TAIL), zero from row `rows` on; without tail, main twice."""
    p_row = p + (o_row.to(tl.int64) * stride * UNIT)[:, None]
    p_main = p_row + tl.arange(0, MAIN)[None, :]
    m_row = (o_row < rows)[:, None]
    main = tl.load(p_main, mask=m_row, other=0.0) if MASKED else tl.load(p_main)
    tail = main
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        m_tail = (o_tail < D) & m_row if MASKED else o_tail < D
        tail = tl.load(p_row + o_tail, mask=m_tail, other=0.0)
    return main, tail


@triton.jit
def _store(
    p, i_b, i_h, o_row, rows, H, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Write rows of a head to a contiguous (B, rows, H, D)."""
    p_row = p + (i_b * rows * H + i_h) * D + (o_row.to(tl.int64) * (H * D))[:, None]
    m_row = (o_row < rows)[:, None]
    tl.store(p_row + tl.arange(0, MAIN)[None, :], main.to(p.dtype.element_ty), mask=m_row)
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(p_row + o_tail, tail.to(p.dtype.element_ty), mask=m_row & (o_tail < D))


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def _dot_rows(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a·bᵀ over the head dim: (R, D) and (S, D) to (R, S)."""
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        out = tl.dot(a_tail, tl.trans(b_tail), out, input_precision=PRECISION)
    return out


@triton.jit
def _dot_add(weights, x, x_tail, acc, acc_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights·x: (R, S) and (S, D) to (R, D)."""
    weights = weights.to(x.dtype)
    acc = tl.dot(weights, x, acc, input_precision=PRECISION)
    if TAIL > 0:
        acc_tail = tl.dot(weights, x_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def _forward_step(
    q, q_tail, p_k, p_v, stride_kn, stride_vn, start, N, scale, top, total, acc, acc_tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running maximum, its sum and the weighted values."""
    o_n = start + tl.arange(0, BLOCK_N)
    k, k_tail = _load(p_k, o_n, N, stride_kn, D, MAIN, TAIL, UNIT, MASKED)
    s = _dot_rows(q, q_tail, k, k_tail, TAIL, PRECISION)
    if MASKED:
        s = tl.where((o_n < N)[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    decay = tl.exp2(top - new)
    acc *= decay[:, None]
    if TAIL > 0:
        acc_tail *= decay[:, None]
    v, v_tail = _load(p_v, o_n, N, stride_vn, D, MAIN, TAIL, UNIT, MASKED)
    acc, acc_tail = _dot_add(p, v, v_tail, acc, acc_tail, TAIL, PRECISION)
    return new, total * decay + tl.sum(p, 1), acc, acc_tail


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    Q, K, V, OUT, LSE,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b, i_h, o_m = _place(M, H, BLOCK_M)
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    q, q_tail = _load(p_q, o_m, M, stride_qn, D, MAIN, TAIL, UNIT, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, acc_tail = _zeros(BLOCK_M, MAIN, TAIL)
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        top, total, acc, acc_tail = _forward_step(
            q, q_tail, p_k, p_v, stride_kn, stride_vn, start, N, scale, top, total, acc, acc_tail,
            D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, False,
        )  # fmt: skip
    if whole < N:
        top, total, acc, acc_tail = _forward_step(
            q, q_tail, p_k, p_v, stride_kn, stride_vn, whole, N, scale, top, total, acc, acc_tail,
            D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, True,
        )  # fmt: skip
    _store(OUT, i_b, i_h, o_m, M, H, acc / total[:, None], acc_tail / total[:, None], D, MAIN, TAIL)
    tl.store(LSE + (i_b * H + i_h) * M + o_m, (top + tl.log2(total)) * _LN2, mask=o_m < M)


@triton.jit
def _dq_step(
    q, q_tail, g, g_tail, lse, delta, p_k, p_v, stride_kn, stride_vn, start, N, scale, dq, dq_tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of one block of keys, without the scale."""
    o_n = start + tl.arange(0, BLOCK_N)
    k, k_tail = _load(p_k, o_n, N, stride_kn, D, MAIN, TAIL, UNIT, MASKED)
    v, v_tail = _load(p_v, o_n, N, stride_vn, D, MAIN, TAIL, UNIT, MASKED)
    p = tl.exp2(_dot_rows(q, q_tail, k, k_tail, TAIL, PRECISION) * scale - lse[:, None])
    if MASKED:  # exp(0 - lse) may be infinite
        p = tl.where((o_n < N)[None, :], p, 0.0)
    dp = _dot_rows(g, g_tail, v, v_tail, TAIL, PRECISION)
    return _dot_add(p * (dp - delta[:, None]), k, k_tail, dq, dq_tail, TAIL, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def _dq_kernel(
    Q, K, V, OUT, G, LSE, DLSE, DELTA, DQ,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and δ for `_dkdv_kernel`. G is dout; DLSE may be None."""
    i_b, i_h, o_m = _place(M, H, BLOCK_M)
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    p_o = OUT + (i_b * stride_ob + i_h * stride_oh) * UNIT
    p_g = G + (i_b * stride_gb + i_h * stride_gh) * UNIT
    o_lse = (i_b * H + i_h) * M + o_m
    g, g_tail = _load(p_g, o_m, M, stride_gn, D, MAIN, TAIL, UNIT, True)
    out, out_tail = _load(p_o, o_m, M, stride_on, D, MAIN, TAIL, UNIT, True)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(g_tail.to(tl.float32) * out_tail.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + o_lse, mask=o_m < M, other=0.0)
    tl.store(DELTA + o_lse, delta, mask=o_m < M)
    q, q_tail = _load(p_q, o_m, M, stride_qn, D, MAIN, TAIL, UNIT, True)
    lse = tl.load(LSE + o_lse, mask=o_m < M, other=0.0) * _LOG2E
    dq, dq_tail = _zeros(BLOCK_M, MAIN, TAIL)
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq, dq_tail = _dq_step(
            q, q_tail, g, g_tail, lse, delta, p_k, p_v, stride_kn, stride_vn, start, N, scale, dq, dq_tail,
            D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, False,
        )  # fmt: skip
    if whole < N:
        dq, dq_tail = _dq_step(
            q, q_tail, g, g_tail, lse, delta, p_k, p_v, stride_kn, stride_vn, whole, N, scale, dq, dq_tail,
            D, MAIN, TAIL, UNIT, PRECISION, BLOCK_N, True,
        )  # fmt: skip
    factor = scale * _LN2
    _store(DQ, i_b, i_h, o_m, M, H, dq * factor, dq_tail * factor, D, MAIN, TAIL)


@triton.jit(do_not_specialize=_SIZES)
def _dkdv_kernel(
    Q, K, V, G, LSE, DELTA, DK, DV,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    H, M, N, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv. The scores are formed transposed, (N, M), so that p and ds multiply without being turned."""
    i_b, i_h, o_n = _place(N, H, BLOCK_N)
    p_q = Q + (i_b * stride_qb + i_h * stride_qh) * UNIT
    p_k = K + (i_b * stride_kb + i_h * stride_kh) * UNIT
    p_v = V + (i_b * stride_vb + i_h * stride_vh) * UNIT
    p_g = G + (i_b * stride_gb + i_h * stride_gh) * UNIT
    o_bh = (i_b * H + i_h) * M
    k, k_tail = _load(p_k, o_n, N, stride_kn, D, MAIN, TAIL, UNIT, True)
    v, v_tail = _load(p_v, o_n, N, stride_vn, D, MAIN, TAIL, UNIT, True)
    dk, dk_tail = _zeros(BLOCK_N, MAIN, TAIL)
    dv, dv_tail = _zeros(BLOCK_N, MAIN, TAIL)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        q, q_tail = _load(p_q, o_m, M, stride_qn, D, MAIN, TAIL, UNIT, True)
        g, g_tail = _load(p_g, o_m, M, stride_gn, D, MAIN, TAIL, UNIT, True)
        # Past the last query g and delta are zero, so that p may be anything finite.
        lse = tl.load(LSE + o_bh + o_m, mask=o_m < M, other=0.0) * _LOG2E
        delta = tl.load(DELTA + o_bh + o_m, mask=o_m < M, other=0.0)
        p = tl.exp2(_dot_rows(k, k_tail, q, q_tail, TAIL, PRECISION) * scale - lse[None, :])
        dv, dv_tail = _dot_add(p, g, g_tail, dv, dv_tail, TAIL, PRECISION)
        dp = _dot_rows(v, v_tail, g, g_tail, TAIL, PRECISION)
        dk, dk_tail = _dot_add(p * (dp - delta[None, :]), q, q_tail, dk, dk_tail, TAIL, PRECISION)
    factor = scale * _LN2
    _store(DK, i_b, i_h, o_n, N, H, dk * factor, dk_tail * factor, D, MAIN, TAIL)
    _store(DV, i_b, i_h, o_n, N, H, dv, dv_tail, D, MAIN, TAIL)


_KERNELS = {"forward": _forward_kernel, "backward_dq": _dq_kernel, "backward_dkdv": _dkdv_kernel}


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    if dtype not in _DTYPES:
        return f"{dtype} is none of float16, bfloat16 and float32"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not one of {HEAD_DIMS.start}, {HEAD_DIMS[1]} … {HEAD_DIMS[-1]}"
    return ""


def _rows(x: Tensor) -> Tensor:
    """x, or a copy where a row is not contiguous, as in the gradient of `out.sum()`."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x_BHND: Tensor) -> Tensor:
    """An empty (B, H, N, D) that lies in memory as (B, N, H, D): joining the heads copies nothing."""
    batch, heads, tokens, width = x_BHND.shape
    return x_BHND.new_empty(batch, tokens, heads, width).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """An empty (B, H, M) in fp32, or fp64 for fp64."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _strides(tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
    """UNIT and the strides of (B, H, N) in it; that of a dim of size 1 is arbitrary, so 0 will do."""
    strides = [s if n > 1 else 0 for x in tensors for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    unit = 1 if any(s % 8 for s in strides) else 8
    return unit, [s // unit for s in strides]


def _tile(name: str, arch: str, head_dim: int, dtype: torch.dtype) -> Tile:
    return _FP32_TILE if dtype == torch.float32 else tiles("attention", name, arch, head_dim)


def _precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: as three products of tf32, or as one where PyTorch may do so."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"  # AMD's matrix cores multiply fp32


def _constants(tile: Tile, head_dim: int, dtype: torch.dtype, unit: int) -> dict[str, Any]:
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    return {
        "D": head_dim,
        "MAIN": main,
        "TAIL": max(16, 1 << (rest - 1).bit_length()) if rest else 0,  # a product sums over at least 16
        "UNIT": unit,
        "PRECISION": _precision(dtype),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }


def _launch(
    name: str,
    q: Tensor,
    k: Tensor,
    scale: float,
    pointers: Sequence[Tensor | None],
    strided: Sequence[Tensor],
) -> None:
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    tile = _tile(name, arch_of(q.device), head_dim, q.dtype)
    unit, strides = _strides(strided)
    blocks = -(-keys // tile.block_n) if name == "backward_dkdv" else -(-queries // tile.block_m)
    with torch.cuda.device_of(q):
        _KERNELS[name][(batch * heads * blocks,)](
            *pointers, *strides, heads, queries, keys, scale / math.log(2),
            **_constants(tile, head_dim, q.dtype, unit), **tile.options,
        )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, H, M, D) and lse (B, H, M), for inputs that `attention` has checked and `refusal` lets pass."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, lse = empty_like(q), empty_lse(q)
    _launch("forward", q, k, scale, [q, k, v, out, lse], [q, k, v])
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, from the gradients of out and lse and what `forward` was given and gave."""
    q, k, v, out, grad_out = (_rows(x) for x in (q, k, v, out, grad_out))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv, delta = empty_like(q), empty_like(k), empty_like(v), empty_lse(q)
    pointers = [q, k, v, out, grad_out, lse, grad_lse, delta, dq]
    _launch("backward_dq", q, k, scale, pointers, [q, k, v, out, grad_out])  # leaves delta
    _launch("backward_dkdv", q, k, scale, [q, k, v, grad_out, lse, delta, dk, dv], [q, k, v, grad_out])
    return dq, dk, dv


def aot_cases() -> Iterator[AotCase]:
    """Every kernel at the head dims that models use, in bf16, on every architecture."""
    for arch in SHARED_BYTES:
        for name, kernel in _KERNELS.items():
            for head_dim in (64, 72, 96, 128):
                tile = _tile(name, arch, head_dim, torch.bfloat16)
                constants = _constants(tile, head_dim, torch.bfloat16, unit=8)
                signature = {x: _type(x) for x in kernel.arg_names if x not in constants}
                yield AotCase(
                    name=f"attention.{name} D={head_dim} bf16",
                    kernel=kernel,
                    arch=arch,
                    signature=signature,
                    constexprs=constants,
                    divisible=tuple(x for x, kind in signature.items() if kind.startswith("*")),
                    options=tile.options,
                    max_spills=tile.max_spills,
                )


def _type(argument: str) -> str:
    if argument in ("LSE", "DLSE", "DELTA"):
        return "*fp32"
    if argument == "scale":
        return "fp32"
    return "i32" if argument in _SIZES else "*bf16"
