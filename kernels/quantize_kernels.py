"""The kernels that quantise, decode, sum and quantise again, each in one pass.

They do the steps of `quantize_reference`, in fp32 and in the same order, and give the same bits: no step is
contracted (`enable_fp_fusion=False`), reciprocals are rounded correctly, and codes, bf16 scales and eight-bit
floats are made by integer arithmetic, so that no format is asked of the GPU. Rotations alone are sums in
another order: products with a matrix of ±1 that is made on the fly.

    H_2m [a; b] = [H_m (a + b); H_m (a - b)]

As the matrix is exact in tf32, two products, with the upper 11 bits of x and with the rest, have about the
precision of fp32: 2·2·64 FLOPs an element, against 5 bytes or more. That stays within the memory's time on a
GPU that does 52 tf32 FLOPs a byte (A100: 77, H100: 148, by their data sheets). fp16 and bf16 that are rotated
as they come need the first product only.

A program owns some blocks of a row, each as two halves: the pairs that 4-bit codes share bytes with, and
those that a rotation of a whole block adds and subtracts. So nothing is moved between threads but the largest
magnitude. Rows are the grid's second axis.

In a kernel: G blocks of a program, B elements of a block, W half of B; a, b the halves (G, W); i_ index,
o_ offsets, m_ mask, p_ pointer.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dtrain.kernels.launch import tl, triton
from dtrain.kernels.rounding import from_minifloat, random_bits, to_minifloat

__all__ = ["decode_kernel", "decode_sum_encode_kernel", "encode_kernel"]

_NUMBERS = ["n", "n_residual", "k", "stride", "stride_k", "stride_row", "factor", "seed", "first"]


@triton.jit
def _blocks(n, UNIT: tl.constexpr, B: tl.constexpr, G: tl.constexpr):
    """This program's row, its blocks (G,) there, how many a row has, and a row's elements; all int64."""
    elements = n.to(tl.int64) * UNIT
    i_block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    return tl.program_id(1).to(tl.int64), i_block, tl.cdiv(elements, B), elements


@triton.jit
def _payload(p, i, stride):
    """Where the i-th of payloads begins that are `stride` times 16 bytes apart."""
    return p + i * stride.to(tl.int64) * 16


@triton.jit
def _load(p, i_block, n, B: tl.constexpr):
    """Both halves of blocks of a tensor in fp32, zero from element n on."""
    o = i_block[:, None] * B + tl.arange(0, B // 2)[None, :]
    a = tl.load(p + o, mask=o < n, other=0.0).to(tl.float32)
    b = tl.load(p + o + B // 2, mask=o + B // 2 < n, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(p, i_block, n, a, b, B: tl.constexpr):
    o = i_block[:, None] * B + tl.arange(0, B // 2)[None, :]
    tl.store(p + o, a.to(p.dtype.element_ty), mask=o < n)
    tl.store(p + o + B // 2, b.to(p.dtype.element_ty), mask=o + B // 2 < n)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _hadamard(ORDER: tl.constexpr):
    """(ORDER, ORDER) of ±1: an element's sign is the parity of the bits that its indices share."""
    o = tl.arange(0, ORDER)
    parity = o[:, None] & o[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (1 - 2 * (parity & 1)).to(tl.float32)


@triton.jit
def _product(x, h, SHORT: tl.constexpr):
    """x·h, where h is ±1. Two parts of x in tf32 carry 22 of its bits; SHORT says that one carries all."""
    if SHORT:
        product = tl.dot(x, h, input_precision="tf32")
    else:
        high = _float(_bits(x) & -8192)
        product = tl.dot(x - high, h, input_precision="tf32")
        product = tl.dot(high, h, product, input_precision="tf32")
    return product


@triton.jit
def _rows_rotated(x, ORDER: tl.constexpr, SHORT: tl.constexpr):
    """H of each group of ORDER elements, at most 64, without its norm."""
    rows = tl.reshape(x, [x.shape[0] * x.shape[1] // ORDER, ORDER])
    return tl.reshape(_product(rows, _hadamard(ORDER), SHORT), x.shape)


@triton.jit
def _rotate(a, b, ORDER: tl.constexpr, SHORT: tl.constexpr):
    """H of each group of ORDER elements."""
    W: tl.constexpr = a.shape[1]
    if ORDER > W:  # a group is a block
        a, b = _rows_rotated(a + b, W, False), _rows_rotated(a - b, W, False)
    elif ORDER == 128:
        a, b = _pairs_rotated(a), _pairs_rotated(b)
    else:
        a, b = _rows_rotated(a, ORDER, SHORT), _rows_rotated(b, ORDER, SHORT)
    return a * ORDER**-0.5, b * ORDER**-0.5


@triton.jit
def _pairs_rotated(x):
    """H of each group of 128 elements, without its norm, in two halves: a matrix of 64 fits the registers."""
    pairs = tl.reshape(x, [x.shape[0] * x.shape[1] // 128, 2, 64])
    a, b = tl.split(tl.trans(pairs, 0, 2, 1))
    a, b = _rows_rotated(a + b, 64, False), _rows_rotated(a - b, 64, False)
    return tl.reshape(tl.trans(tl.join(a, b), 0, 2, 1), x.shape)


@triton.jit
def _scale_bits(a, b, LARGEST: tl.constexpr):
    """fp32 bits of each block's scale (G,), and where it is NaN."""
    # Bits without their sign are in the order of the magnitudes, NaN last.
    amax = tl.max(tl.maximum(_bits(a) & 0x7FFFFFFF, _bits(b) & 0x7FFFFFFF), axis=1)
    scale = (_bits(_float(amax) * (1 / LARGEST)) + 0xFFFF) & -65536
    scale = tl.where(amax < 0x08800000, 0x3F800000, scale)  # below 2^-110: 1
    poisoned = amax >= 0x7F000000  # from 2^127 on
    return tl.where(poisoned, 0x7FC00000, scale), poisoned


@triton.jit
def _code(t, noise, LARGEST: tl.constexpr):
    """Codes of numbers in units of their scales, int32; those of e4m3 are its bits."""
    if LARGEST == 448:
        code = to_minifloat(t, noise, 2.0**-120, 3, 0x7E) | ((_bits(t) >> 24) & 0x80)
    elif noise is None:
        code = _bits(t + 12582912.0) - 0x4B400000  # 1.5·2^23: what remains of the sum is a whole number
    else:  # in units of 2^-23, which t from 1 on is a multiple of
        code = ((t * 8388608.0).to(tl.int32) + (noise >> 9).to(tl.int32)) >> 23
        code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    return code


@triton.jit
def _value(code, LARGEST: tl.constexpr):
    """The numbers that codes are."""
    if LARGEST == 448:
        magnitude = from_minifloat(code & 0x7F, 2.0**-120, 3)
        value = _float(_bits(magnitude) | ((code & 0x80) << 24))
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def _write(p, i_block, blocks, ca, cb, scale, B: tl.constexpr, LARGEST: tl.constexpr):
    """Codes and scales of blocks to a payload; the padding as scales of zero."""
    SIZE: tl.constexpr = B // 2 if LARGEST == 7 else B
    m_block = i_block < blocks
    o = i_block[:, None] * SIZE + tl.arange(0, B // 2)[None, :]
    if LARGEST == 7:
        tl.store(p + o, ((ca + 8) | ((cb + 8) << 4)).to(tl.uint8), mask=m_block[:, None])
    else:
        tl.store(p + o, ca.to(tl.uint8), mask=m_block[:, None])
        tl.store(p + o + B // 2, cb.to(tl.uint8), mask=m_block[:, None])
    p_scale = (p + blocks * SIZE).to(tl.pointer_type(tl.int16))
    bits = tl.where(m_block, scale >> 16, 0).to(tl.int16)
    tl.store(p_scale + i_block, bits, mask=i_block < (blocks + 7) // 8 * 8)


@triton.jit
def _read(p, i_block, blocks, B: tl.constexpr, LARGEST: tl.constexpr):
    """Both halves of what blocks of a payload stand for; zero beyond its end."""
    SIZE: tl.constexpr = B // 2 if LARGEST == 7 else B
    m_block = i_block < blocks
    o = i_block[:, None] * SIZE + tl.arange(0, B // 2)[None, :]
    p_scale = (p + blocks * SIZE).to(tl.pointer_type(tl.int16))
    scale = _float(tl.load(p_scale + i_block, mask=m_block, other=0).to(tl.int32) << 16)[:, None]
    ca = tl.load(p + o, mask=m_block[:, None], other=0).to(tl.int32)
    if LARGEST == 7:
        cb = (ca >> 4) - 8
        ca = (ca & 15) - 8
    else:
        cb = tl.load(p + o + B // 2, mask=m_block[:, None], other=0).to(tl.int32)
        if LARGEST == 127:
            ca = (ca << 24) >> 24
            cb = (cb << 24) >> 24
    return _value(ca, LARGEST) * scale, _value(cb, LARGEST) * scale


@triton.jit
def _quantise(
    p, i_block, blocks, a, b, seed, first,
    B: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Write blocks to a payload; what is left of them, zero where they are poisoned."""
    scale, poisoned = _scale_bits(a, b, LARGEST)
    s = _float(scale)[:, None]
    inverse = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    noise_a = None
    noise_b = None
    if STOCHASTIC:
        counter = (first + i_block * B) // 4
        noise_a = random_bits(seed, counter, B // 2)
        noise_b = random_bits(seed, counter + B // 8, B // 2)
    ca = _code(tl.where(poisoned[:, None], 0.0, a * inverse), noise_a, LARGEST)
    cb = _code(tl.where(poisoned[:, None], 0.0, b * inverse), noise_b, LARGEST)
    _write(p, i_block, blocks, ca, cb, scale, B, LARGEST)
    a = tl.where(poisoned[:, None], 0.0, a - _value(ca, LARGEST) * s)
    b = tl.where(poisoned[:, None], 0.0, b - _value(cb, LARGEST) * s)
    return a, b


@triton.jit
def _residual(p, i_row, blocks, n, B: tl.constexpr):
    """Where a row's residual begins: of n elements, or of bytes, a payload of int8."""
    if p.dtype.element_ty == tl.uint8:
        n = blocks * B + (blocks + 7) // 8 * 16
    return p + i_row * n


@triton.jit
def _with_residual(p, i_block, blocks, n, a, b, B: tl.constexpr):
    if p.dtype.element_ty == tl.uint8:
        ra, rb = _read(p, i_block, blocks, B, 127)
    else:
        ra, rb = _load(p, i_block, n, B)
    return a + ra, b + rb


@triton.jit
def _keep_residual(p, i_block, blocks, n, a, b, B: tl.constexpr):
    if p.dtype.element_ty == tl.uint8:
        _quantise(p, i_block, blocks, a, b, 0, 0, B, 127, False)
    else:
        _store(p, i_block, n, a, b, B)


@triton.jit(do_not_specialize=_NUMBERS)
def encode_kernel(
    X, MINUS, RESIDUAL, PAYLOAD, n, n_residual, stride, seed, first,
    B: tl.constexpr, LARGEST: tl.constexpr, ROTATION: tl.constexpr, SHORT: tl.constexpr,
    STOCHASTIC: tl.constexpr, UNIT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """MINUS and RESIDUAL may be None. Sizes count UNIT elements, the stride of rows of PAYLOAD 16 bytes."""
    i_row, i_block, blocks, n = _blocks(n, UNIT, B, G)
    a, b = _load(X + i_row * n, i_block, n, B)
    if MINUS is not None:
        ma, mb = _load(MINUS + i_row * n, i_block, n, B)
        a -= ma
        b -= mb
    if ROTATION > 0:
        a, b = _rotate(a, b, ROTATION, SHORT)
    if RESIDUAL is not None:
        n_residual = n_residual.to(tl.int64) * UNIT
        p_residual = _residual(RESIDUAL, i_row, blocks, n_residual, B)
        a, b = _with_residual(p_residual, i_block, blocks, n_residual, a, b, B)
    p = _payload(PAYLOAD, i_row, stride)
    a, b = _quantise(p, i_block, blocks, a, b, seed, first + i_row * blocks * B, B, LARGEST, STOCHASTIC)
    if RESIDUAL is not None:
        _keep_residual(p_residual, i_block, blocks, n_residual, a, b, B)


@triton.jit
def _sum(p, i_block, blocks, k, stride, factor, G: tl.constexpr, B: tl.constexpr, LARGEST: tl.constexpr):
    """Σ c·s of the payloads, in their order, times a factor."""
    a = tl.full([G, B // 2], -0.0, tl.float32)  # the one number that changes no other, the sign of zero too
    b = a
    for i in range(k):
        pa, pb = _read(_payload(p, i, stride), i_block, blocks, B, LARGEST)
        a += pa
        b += pb
    return a * factor, b * factor


@triton.jit(do_not_specialize=_NUMBERS)
def decode_kernel(
    PAYLOADS, OUT, n, k, stride_k, stride_row, factor,
    B: tl.constexpr, LARGEST: tl.constexpr, ROTATION: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Into OUT, or with ADD onto what it holds. Strides of PAYLOADS count 16 bytes."""
    i_row, i_block, blocks, n = _blocks(n, UNIT, B, G)
    a, b = _sum(_payload(PAYLOADS, i_row, stride_row), i_block, blocks, k, stride_k, factor, G, B, LARGEST)
    if ROTATION > 0:
        a, b = _rotate(a, b, ROTATION, False)
    p = OUT + i_row * n
    if ADD:
        oa, ob = _load(p, i_block, n, B)
        a += oa
        b += ob
    _store(p, i_block, n, a, b, B)


@triton.jit(do_not_specialize=_NUMBERS)
def decode_sum_encode_kernel(
    PAYLOADS, RESIDUAL, PAYLOAD, n, n_residual, k, stride_k, stride_row, stride, factor, seed, first,
    B: tl.constexpr, LARGEST_IN: tl.constexpr, LARGEST: tl.constexpr,
    ROTATION_IN: tl.constexpr, ROTATION: tl.constexpr, STOCHASTIC: tl.constexpr,
    UNIT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """From `decode_kernel`'s sum on as `encode_kernel`."""
    i_row, i_block, blocks, _ = _blocks(n, UNIT, B, G)
    a, b = _sum(_payload(PAYLOADS, i_row, stride_row), i_block, blocks, k, stride_k, factor, G, B, LARGEST_IN)
    if ROTATION_IN != ROTATION:
        if ROTATION_IN > 0:
            a, b = _rotate(a, b, ROTATION_IN, False)
        if ROTATION > 0:
            a, b = _rotate(a, b, ROTATION, False)
    if RESIDUAL is not None:
        n_residual = n_residual.to(tl.int64) * UNIT
        p_residual = _residual(RESIDUAL, i_row, blocks, n_residual, B)
        a, b = _with_residual(p_residual, i_block, blocks, n_residual, a, b, B)
    p = _payload(PAYLOAD, i_row, stride)
    a, b = _quantise(p, i_block, blocks, a, b, seed, first + i_row * blocks * B, B, LARGEST, STOCHASTIC)
    if RESIDUAL is not None:
        _keep_residual(p_residual, i_block, blocks, n_residual, a, b, B)
