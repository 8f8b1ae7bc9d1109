"""What the attention kernels share: which rows a program owns and meets, and rows of a head in registers.

Blocks are powers of two wide, so rows are held as a main part, which needs no mask, and a tail: 72 = 64 + 16
with half of the tail masked, 128 = 128 without one. They are read by pointers, or, with TMA, by tensor
descriptors. Strides count UNIT elements, 8 where they allow it: Triton then knows that rows start at 16
bytes, which wide loads need, even for D = 72, and compiles nothing anew when sizes change.

A program walks over blocks of the other side: over all its rows, or over the entries of a block mask's list,
in both cases first from lo to mid, where blocks are whole and need no mask, then from mid to hi. A listed
block may hold more rows than a program takes at a time, SUB times as many.

In a kernel: i_ index, o_ offsets, m_ mask, p_ pointer. R, S rows of two blocks, D width of a head.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dtrain.kernels.launch import tl, triton

__all__ = ["add_rows", "dot_add", "dot_rows", "listed", "load_rows", "owned", "source", "store_rows", "zeros"]


@triton.jit
def owned(
    BLOCKS, n_blocks, H, tokens, others,
    BLOCK: tl.constexpr, SUB: tl.constexpr, OTHER: tl.constexpr, OTHER_SUB: tl.constexpr,
):  # fmt: skip
    """Of this program: batch, head, its first row and the end of its rows, and its walk: lo, mid, hi."""
    i_block = tl.program_id(0) % (n_blocks * SUB)
    i_bh = tl.program_id(0) // (n_blocks * SUB)
    if BLOCKS is not None:
        p_block = BLOCKS + i_block // SUB * 5
        skipped = i_block % SUB * BLOCK
        first = tl.load(p_block) + skipped
        end = tl.load(p_block) + tl.load(p_block + 1)
        lo = tl.load(p_block + 2) * OTHER_SUB
        mid = tl.load(p_block + 3) * OTHER_SUB
        hi = tl.load(p_block + 4) * OTHER_SUB
        if SUB > 1:  # a partial block may leave nothing to this program
            mid = tl.where(first < end, mid, lo)
            hi = tl.where(first < end, hi, lo)
    else:
        first = i_block * BLOCK
        end = tokens
        lo = 0
        mid = others // OTHER * OTHER
        hi = others
    return (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), first, end, lo, mid, hi


@triton.jit
def listed(ENTRIES, i, tokens, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """First row of the block met at i, and the end of its rows."""
    start = i
    end = tokens
    if ENTRIES is not None:
        p_entry = ENTRIES + i // SUB * 2
        start = tl.load(p_entry)
        end = start + tl.load(p_entry + 1)
        start += i % SUB * BLOCK
    return start, end


@triton.jit
def source(
    p, tokens, stride,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Where `load_rows` reads a head from, twice: the pointer, or descriptors of main part and tail."""
    main = p
    tail = p
    if TMA:
        stride = stride.to(tl.int64) * UNIT
        main = tl.make_tensor_descriptor(p, [tokens, D], [stride, 1], [BLOCK, MAIN])
        tail = main
        if TAIL > 0:
            tail = tl.make_tensor_descriptor(p, [tokens, D], [stride, 1], [BLOCK, TAIL])
    return main, tail


@triton.jit
def load_rows(
    src, src_tail, start, end, stride,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows from `start` on as (R, MAIN) and (R, TAIL), zero from row `end` on; without tail, main twice."""
    o_row = start + tl.arange(0, BLOCK)
    m_row = (o_row < end)[:, None]
    if TMA:
        main = src.load([start, 0])
        main = tl.where(m_row, main, 0.0) if MASKED else main
        tail = main
        if TAIL > 0:
            tail = src_tail.load([start, MAIN])
            tail = tl.where(m_row, tail, 0.0) if MASKED else tail
    else:
        p_row = src + (o_row.to(tl.int64) * stride * UNIT)[:, None]
        p_main = p_row + tl.arange(0, MAIN)[None, :]
        main = tl.load(p_main, mask=m_row, other=0.0) if MASKED else tl.load(p_main)
        tail = main
        if TAIL > 0:
            o_tail = MAIN + tl.arange(0, TAIL)[None, :]
            m_tail = (o_tail < D) & m_row if MASKED else o_tail < D
            tail = tl.load(p_row + o_tail, mask=m_tail, other=0.0)
    return main, tail


@triton.jit
def store_rows(
    p, start, end, stride, main, tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write rows of a head from `start` to `end`; `stride` counts elements."""
    o_row = start + tl.arange(0, BLOCK)
    p_row = p + (o_row.to(tl.int64) * stride)[:, None]
    m_row = (o_row < end)[:, None]
    tl.store(p_row + tl.arange(0, MAIN)[None, :], main.to(p.dtype.element_ty), mask=m_row)
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(p_row + o_tail, tail.to(p.dtype.element_ty), mask=m_row & (o_tail < D))


@triton.jit
def add_rows(
    dst, dst_tail, start, end, stride, main, tail,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to rows in memory, in no particular order; with TMA, those from `end` on must be zero."""
    if TMA:
        dst.atomic_add([start, 0], main)
        if TAIL > 0:
            dst_tail.atomic_add([start, MAIN], tail)
    else:
        o_row = start + tl.arange(0, BLOCK)
        p_row = dst + (o_row.to(tl.int64) * stride)[:, None]
        m_row = (o_row < end)[:, None]
        p_main = p_row + tl.arange(0, MAIN)[None, :]
        if MASKED:
            tl.atomic_add(p_main, main, mask=m_row, sem="relaxed")
        else:
            tl.atomic_add(p_main, main, sem="relaxed")
        if TAIL > 0:
            o_tail = MAIN + tl.arange(0, TAIL)[None, :]
            m_tail = (o_tail < D) & m_row if MASKED else (o_tail < D) & (o_row >= 0)[:, None]
            tl.atomic_add(p_row + o_tail, tail, mask=m_tail, sem="relaxed")


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """(R, MAIN) and (R, TAIL) in fp32; without tail, the same twice."""
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def dot_rows(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a·bᵀ over the head dim: (R, D) and (S, D) to (R, S)."""
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        out = tl.dot(a_tail, tl.trans(b_tail), out, input_precision=PRECISION)
    return out


@triton.jit
def dot_add(weights, x, x_tail, acc, acc_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights·x: (R, S) and (S, D) to (R, D)."""
    weights = weights.to(x.dtype)
    acc = tl.dot(weights, x, acc, input_precision=PRECISION)
    if TAIL > 0:
        acc_tail = tl.dot(weights, x_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail
