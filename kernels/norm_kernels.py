"""The kernels of residual sum, gate, norm and modulation: one pass over memory each way.

    s = x + gate ∘ branch      n = (s - mean)·r, or s·r with "rms"      y = (n ∘ w + b) ∘ (1 + scale) + shift

    g = dy ∘ (1 + scale)       dn = g ∘ w       ds = grad_s + r·(dn - mean(dn) - n·mean(dn ∘ n))
    dx = ds                    dbranch = gate ∘ ds                       dgate = Σ ds ∘ branch
    dw = Σ g ∘ n               db = Σ g         dscale = Σ dy ∘ (n ∘ w + b)       dshift = Σ dy

in fp32 with one rounding for each output; "rms" has no mean(dn). dw and db are sums over all rows, dscale,
dshift and dgate over the rows of a sample. All rows of a program are of one sample, so all five follow from
three sums of a program: Σ dy ∘ n, Σ dy and Σ ds ∘ branch. A second kernel adds up what the programs leave, in
an order that the shapes alone decide: a run repeats bit by bit, on any number of SMs.

The forward leaves mean and r, 8 bytes a row: formed again, they would cost the backward two reductions, one
after the other, before the one that it needs.

A row is held as a main part, a power of two, and a tail: 1152 = 1024 + 128. Strides count UNIT elements, 8
where they allow it: Triton then knows that rows start at 16 bytes. A program keeps w ∘ (1 + scale) and
b ∘ (1 + scale) + shift in registers while it walks its rows, the next of which are copied to shared memory.

Shapes: B samples, N rows of each, D width, R rows at a time, W width of a part of a row.
In a kernel: i_ index, o_ offsets, m_ mask, p_ pointer; _t the tail.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dtrain.kernels.launch import tl, triton

__all__ = ["backward_kernel", "forward_kernel", "sum_kernel"]


@triton.jit
def _place(N, rows):
    """Sample of this program, its first row and the end of its rows."""
    blocks = tl.cdiv(N, rows)
    first = tl.program_id(0) % blocks * rows
    return (tl.program_id(0) // blocks).to(tl.int64), first, tl.minimum(first + rows, N)


@triton.jit
def _vector(
    p, i_b, stride, DEFAULT: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Vector of a sample in fp32 as (1, MAIN) and (1, TAIL); where there is none, DEFAULT as (1, 1)."""
    main = tl.full([1, 1], DEFAULT, tl.float32)
    tail = main
    if p is not None:
        p += i_b * stride * UNIT
        main = tl.load(p + tl.arange(0, MAIN)[None, :]).to(tl.float32)
        if TAIL > 0:
            o_tail = MAIN + tl.arange(0, TAIL)[None, :]
            tail = tl.load(p + o_tail, mask=o_tail < D, other=0.0).to(tl.float32)
    return main, tail


@triton.jit
def _scaled(
    p, DEFAULT: tl.constexpr, SCALE, i_b, stride_scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A vector of all samples, or DEFAULT, times 1 + scale."""
    w, w_t = _vector(p, 0, 0, DEFAULT, D, MAIN, TAIL, UNIT)
    scale, scale_t = _vector(SCALE, i_b, stride_scale, 0.0, D, MAIN, TAIL, UNIT)
    return w * (1 + scale), w_t * (1 + scale_t)


@triton.jit
def _load(
    p, i_b, o_n, m_n, stride_b, stride_n,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows of a sample in fp32 as (R, MAIN) and (R, TAIL), zero beyond; without tail, main twice."""
    p_row = p + ((i_b * stride_b + o_n.to(tl.int64) * stride_n) * UNIT)[:, None]
    main = tl.load(p_row + tl.arange(0, MAIN)[None, :], mask=m_n[:, None], other=0.0).to(tl.float32)
    tail = main
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        tail = tl.load(p_row + o_tail, mask=m_n[:, None] & (o_tail < D), other=0.0).to(tl.float32)
    return main, tail


@triton.jit
def _store(p, o_row, m_n, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Rows `o_row` of a contiguous (B·N, D)."""
    p_row = p + (o_row * D)[:, None]
    tl.store(p_row + tl.arange(0, MAIN)[None, :], main.to(p.dtype.element_ty), mask=m_n[:, None])
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(p_row + o_tail, tail.to(p.dtype.element_ty), mask=m_n[:, None] & (o_tail < D))


@triton.jit
def _mean(main, tail, D: tl.constexpr, TAIL: tl.constexpr):
    """(R,) means over rows that are zero beyond their end."""
    total = tl.sum(main, 1)
    if TAIL > 0:
        total += tl.sum(tail, 1)
    return total / D


@triton.jit
def _normalised(s, s_t, eps, RMS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """n in two parts, mean and r (R,)."""
    mean = tl.zeros([s.shape[0]], tl.float32)
    if not RMS:
        mean = _mean(s, s_t, D, TAIL)
        s -= mean[:, None]
        if TAIL > 0:
            o_tail = MAIN + tl.arange(0, TAIL)[None, :]
            s_t = tl.where(o_tail < D, s_t - mean[:, None], 0.0)
    r = tl.rsqrt(_mean(s * s, s_t * s_t, D, TAIL) + eps)
    return s * r[:, None], s_t * r[:, None], mean, r


@triton.jit
def _joined(main, tail):
    """Sums over the rows of a group, (1, W) each."""
    return tl.sum(main, 0)[None, :], tl.sum(tail, 0)[None, :]


_FORWARD_SIZES = (
    "stride_xb",
    "stride_xn",
    "stride_bb",
    "stride_bn",
    "stride_gate",
    "stride_scale",
    "stride_shift",
)


@triton.jit(do_not_specialize=[*_FORWARD_SIZES, "N", "rows"])
def forward_kernel(
    X, BRANCH, GATE, WEIGHT, BIAS, SCALE, SHIFT, S, Y, MEAN, R,
    stride_xb, stride_xn, stride_bb, stride_bn, stride_gate, stride_scale, stride_shift, N, rows, eps,
    RMS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Without BRANCH there is no S; without Y there is no norm."""
    i_b, first, end = _place(N, rows)
    gate, gate_t = _vector(GATE, i_b, stride_gate, 1.0, D, MAIN, TAIL, UNIT)
    if Y is not None:
        w, w_t = _scaled(WEIGHT, 1.0, SCALE, i_b, stride_scale, D, MAIN, TAIL, UNIT)
        b, b_t = _vector(SHIFT, i_b, stride_shift, 0.0, D, MAIN, TAIL, UNIT)
        if BIAS is not None:
            scaled, scaled_t = _scaled(BIAS, 0.0, SCALE, i_b, stride_scale, D, MAIN, TAIL, UNIT)
            b += scaled
            b_t += scaled_t
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        o_n = start + tl.arange(0, ROWS)
        m_n = o_n < end
        o_row = i_b * N + o_n
        s, s_t = _load(X, i_b, o_n, m_n, stride_xb, stride_xn, D, MAIN, TAIL, UNIT)
        if BRANCH is not None:
            a, a_t = _load(BRANCH, i_b, o_n, m_n, stride_bb, stride_bn, D, MAIN, TAIL, UNIT)
            s += gate * a
            s_t += gate_t * a_t
            _store(S, o_row, m_n, s, s_t, D, MAIN, TAIL)
        if Y is not None:
            n, n_t, mean, r = _normalised(s, s_t, eps, RMS, D, MAIN, TAIL)
            _store(Y, o_row, m_n, n * w + b, n_t * w_t + b_t, D, MAIN, TAIL)
            tl.store(R + o_row, r, mask=m_n)
            if not RMS:
                tl.store(MEAN + o_row, mean, mask=m_n)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """(R, MAIN) and (R, TAIL) in fp32; without tail, main twice."""
    main = tl.zeros([ROWS, MAIN], tl.float32)
    tail = main
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    return main, tail


@triton.jit
def _store_sum(p, main, tail, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """What this program adds, (1, W) in two parts, as its row of (programs, D)."""
    p += tl.program_id(0).to(tl.int64) * D
    tl.store(p + tl.arange(0, MAIN)[None, :], main)
    if TAIL > 0:
        o_tail = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(p + o_tail, tail, mask=o_tail < D)


_BACKWARD_SIZES = (
    "stride_hb", "stride_hn", "stride_gb", "stride_gn", "stride_sb", "stride_sn", "stride_bb", "stride_bn",
    "stride_gate", "stride_scale",
)  # fmt: skip


@triton.jit(do_not_specialize=[*_BACKWARD_SIZES, "N", "rows"])
def backward_kernel(
    GS, GY, S, MEAN, R, BRANCH, GATE, WEIGHT, BIAS, SCALE,
    DX, DBRANCH, DWEIGHT, DBIAS, DSCALE, DSHIFT, DGATE,
    stride_hb, stride_hn, stride_gb, stride_gn, stride_sb, stride_sn, stride_bb, stride_bn,
    stride_gate, stride_scale, N, rows,
    RMS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DWEIGHT to DGATE (programs, D) fp32 take this program's sums. Without GY, s was not normed."""
    i_b, first, end = _place(N, rows)
    gate, gate_t = _vector(GATE, i_b, stride_gate, 1.0, D, MAIN, TAIL, UNIT)
    w, w_t = _scaled(WEIGHT, 1.0, SCALE, i_b, stride_scale, D, MAIN, TAIL, UNIT)
    # Sums stay apart by the row of a group and are joined once: in the loop they meet no barrier.
    sum_dy, sum_dy_t = _zeros(ROWS, MAIN, TAIL)
    sum_dyn, sum_dyn_t = _zeros(ROWS, MAIN, TAIL)
    sum_dsa, sum_dsa_t = _zeros(ROWS, MAIN, TAIL)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        o_n = start + tl.arange(0, ROWS)
        m_n = o_n < end
        o_row = i_b * N + o_n
        # All loads come before the first store, beyond which the compiler may not move them.
        if BRANCH is not None:
            a, a_t = _load(BRANCH, i_b, o_n, m_n, stride_bb, stride_bn, D, MAIN, TAIL, UNIT)
        ds, ds_t = _zeros(1, 1, 1)
        if GS is not None:
            ds, ds_t = _load(GS, i_b, o_n, m_n, stride_hb, stride_hn, D, MAIN, TAIL, UNIT)
        if GY is not None:
            dn, dn_t = _load(GY, i_b, o_n, m_n, stride_gb, stride_gn, D, MAIN, TAIL, UNIT)
            n, n_t = _load(S, i_b, o_n, m_n, stride_sb, stride_sn, D, MAIN, TAIL, UNIT)
            r = tl.load(R + o_row, mask=m_n, other=0.0)
            if not RMS:
                mean = tl.load(MEAN + o_row, mask=m_n, other=0.0)[:, None]
                n -= mean
                n_t -= mean
            n *= r[:, None]
            n_t *= r[:, None]
            sum_dy += dn
            sum_dy_t += dn_t
            sum_dyn += dn * n
            sum_dyn_t += dn_t * n_t
            dn *= w
            dn_t *= w_t
            along = _mean(dn * n, dn_t * n_t, D, TAIL)
            if not RMS:
                mean = _mean(dn, dn_t, D, TAIL)[:, None]
                dn -= mean
                dn_t -= mean
            ds += (dn - n * along[:, None]) * r[:, None]
            ds_t += (dn_t - n_t * along[:, None]) * r[:, None]
        if DX is not None:
            _store(DX, o_row, m_n, ds, ds_t, D, MAIN, TAIL)
        if DBRANCH is not None:
            _store(DBRANCH, o_row, m_n, gate * ds, gate_t * ds_t, D, MAIN, TAIL)
        if DGATE is not None:
            sum_dsa += ds * a
            sum_dsa_t += ds_t * a_t
    if DGATE is not None:
        dsa, dsa_t = _joined(sum_dsa, sum_dsa_t)
        _store_sum(DGATE, dsa, dsa_t, D, MAIN, TAIL)
    dy, dy_t = _joined(sum_dy, sum_dy_t)
    dyn, dyn_t = _joined(sum_dyn, sum_dyn_t)
    gain, gain_t = _scaled(None, 1.0, SCALE, i_b, stride_scale, D, MAIN, TAIL, UNIT)
    if DWEIGHT is not None:
        _store_sum(DWEIGHT, dyn * gain, dyn_t * gain_t, D, MAIN, TAIL)
    if DBIAS is not None:
        _store_sum(DBIAS, dy * gain, dy_t * gain_t, D, MAIN, TAIL)
    if DSCALE is not None:
        w, w_t = _vector(WEIGHT, 0, 0, 1.0, D, MAIN, TAIL, UNIT)
        b, b_t = _vector(BIAS, 0, 0, 0.0, D, MAIN, TAIL, UNIT)
        _store_sum(DSCALE, dyn * w + dy * b, dyn_t * w_t + dy_t * b_t, D, MAIN, TAIL)
    if DSHIFT is not None:
        _store_sum(DSHIFT, dy, dy_t, D, MAIN, TAIL)


@triton.jit
def _sum(p, OUT, n, D: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of one row of OUT (rows, D), from (rows, n, D)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    p += i_row * n * D + o_d[None, :]
    total = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for start in range(0, n, AT_ONCE):
        o_n = start + tl.arange(0, AT_ONCE)
        mask = (o_n < n)[:, None] & m_d[None, :]
        total += tl.load(p + o_n.to(tl.int64)[:, None] * D, mask=mask, other=0.0)
    tl.store(OUT + i_row * D + o_d, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n", "programs"])
def sum_kernel(
    SUMS, A, B, C, n, programs, D: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A, B and C (rows, D) from SUMS (up to 3, programs, D), n programs a row; one for each z of the grid."""
    i_sum = tl.program_id(2)
    p = SUMS + i_sum.to(tl.int64) * programs * D
    if i_sum == 0:
        _sum(p, A, n, D, AT_ONCE, COLUMNS)
    elif i_sum == 1:
        _sum(p, B, n, D, AT_ONCE, COLUMNS)
    else:
        _sum(p, C, n, D, AT_ONCE, COLUMNS)
