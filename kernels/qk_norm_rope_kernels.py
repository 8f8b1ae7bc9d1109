"""The kernels that norm and rotate queries and keys in one pass over a packed qkv, and their way back.

Every row x of a query or key, a head of a token, becomes y and goes back from dy to dx as

    z = w ∘ x·r,  r = 1/√(mean(x²) + eps)          y = rotation of the pairs (z[i], z[i + D/2])
    dz = rotation of dy backwards                   dw = Σ dz ∘ x·r
    dx = r·(w ∘ dz - x·r · mean(w ∘ dz ∘ x·r))

in fp32 with one rounding at the end. The weights' gradients are summed program by program and then over the
programs, in a fixed order: a run repeats bit by bit. Sources: Zhang & Sennrich, arXiv 1910.07467; Su et al.,
arXiv 2104.09864.

A program owns some tokens and heads. It keeps weights and angles in registers while it walks the heads, and
takes rows as two halves, since those are the pairs. Strides count UNIT elements, 8 where the halves allow it
and 4 for D = 72: Triton then knows that they start at 16 or 8 bytes.

Shapes: B batch, N tokens, H heads, D width of a head, T tokens of a program, W half of D or the power of two
above it. In a kernel: i_ index, o_ offsets, m_ mask, p_ pointer; a, b the halves of rows; G gradient of Y.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.kernels.attention_launch import readable
from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, known_arch, tl, triton

__all__ = ["NormRope", "aot_cases", "backward", "forward", "refusal"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SIZES = [f"stride_{x}{axis}" for x in ("x", "y", "gq", "gk", "gv") for axis in "bnh"] + ["N", "H"]


class NormRope(NamedTuple):
    """What is done to queries and keys.

    Args:
        q_weight, k_weight: (D,) of their RMS norms; None leaves them as they are.
        cos, sin: (N, D/2) fp32, see `reference.rope_angles`; None rotates nothing.
        eps: of the norms.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float

    @property
    def norms(self) -> bool:
        return self.q_weight is not None or self.k_weight is not None

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return self.norms or self.cos is not None


@triton.jit
def _place(N, H, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Batch, tokens, first head and end of the heads of this program."""
    groups = tl.cdiv(H, HEADS)
    blocks = tl.cdiv(N, TOKENS)
    i_block = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * HEADS
    o_n = i_block % blocks * TOKENS + tl.arange(0, TOKENS)
    return (i_block // blocks).to(tl.int64), o_n, first, tl.minimum(first + HEADS, H)


@triton.jit
def _rows(p, i_b, o_n, i_h, o_d, stride_b, stride_n, stride_h, UNIT: tl.constexpr):
    """Pointers to the first halves of the tokens' rows of a head, (T, W)."""
    p += (i_b * stride_b + i_h * stride_h.to(tl.int64)) * UNIT
    return p + (o_n.to(tl.int64) * stride_n * UNIT)[:, None] + o_d[None, :]


@triton.jit
def _load(p, mask, HALF: tl.constexpr):
    """Both halves."""
    return tl.load(p, mask=mask, other=0.0), tl.load(p + HALF, mask=mask, other=0.0)


@triton.jit
def _store(p, mask, a, b, HALF: tl.constexpr):
    tl.store(p, a.to(p.dtype.element_ty), mask=mask)
    tl.store(p + HALF, b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _weight(WEIGHT, o_d, HALF: tl.constexpr):
    """Both halves of a weight, (1, W); of none, ones."""
    a = tl.full([1, 1], 1.0, tl.float32)
    b = a
    if WEIGHT is not None:
        a, b = _load(WEIGHT + o_d[None, :], (o_d < HALF)[None, :], HALF)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _angles(COS, SIN, o_n, o_d, mask, HALF: tl.constexpr):
    """Cosines and sines of the tokens, (T, W); without tables, those of no angle."""
    cos = tl.full([1, 1], 1.0, tl.float32)
    sin = tl.full([1, 1], 0.0, tl.float32)
    if COS is not None:
        o_table = o_n.to(tl.int64)[:, None] * HALF + o_d[None, :]
        cos = tl.load(COS + o_table, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + o_table, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _normalised(a, b, m_row, eps, D: tl.constexpr):
    """x·r and r; of a row that is not there r is 1, whatever eps is."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    square = tl.sum(a * a + b * b, 1)[:, None] / D + eps
    r = tl.rsqrt(tl.where(m_row, square, 1.0))
    return a * r, b * r, r


@triton.jit
def _turn(a, b, m_row, WEIGHT, wa, wb, COS, cos, sin, eps, D: tl.constexpr):
    """y from x."""
    if WEIGHT is not None:
        a, b, _ = _normalised(a, b, m_row, eps, D)
        a *= wa
        b *= wb
    if COS is not None:
        a, b = a * cos - b * sin, b * cos + a * sin
    return a, b


@triton.jit
def _turn_back(
    a, b, xa, xb, m_row, WEIGHT, wa, wb, COS, cos, sin, eps, sum_a, sum_b, D: tl.constexpr
):  # fmt: skip
    """dx from dy, and dw with this head's share."""
    if COS is not None:
        a, b = a * cos + b * sin, b * cos - a * sin
    if WEIGHT is not None:
        xa, xb, r = _normalised(xa, xb, m_row, eps, D)
        sum_a += a * xa
        sum_b += b * xb
        a *= wa
        b *= wb
        mean = tl.sum(a * xa + b * xb, 1)[:, None] / D
        a = (a - xa * mean) * r
        b = (b - xb * mean) * r
    return a, b, sum_a, sum_b


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    Q, K, V, YQ, YK, YV, Q_WEIGHT, K_WEIGHT, COS, SIN,
    stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh, N, H, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """V and YV may be None together."""
    i_b, o_n, first, end = _place(N, H, TOKENS, HEADS)
    HALF: tl.constexpr = D // 2
    o_d = tl.arange(0, WIDTH)
    m_row = (o_n < N)[:, None]
    mask = m_row & (o_d < HALF)[None, :]
    cos, sin = _angles(COS, SIN, o_n, o_d, mask, HALF)
    w_qa, w_qb = _weight(Q_WEIGHT, o_d, HALF)
    w_ka, w_kb = _weight(K_WEIGHT, o_d, HALF)
    for i_h in range(first, end):
        # All loads come before the first store, beyond which the compiler may not move them.
        qa, qb = _load(_rows(Q, i_b, o_n, i_h, o_d, stride_xb, stride_xn, stride_xh, UNIT), mask, HALF)
        ka, kb = _load(_rows(K, i_b, o_n, i_h, o_d, stride_xb, stride_xn, stride_xh, UNIT), mask, HALF)
        if V is not None:
            va, vb = _load(_rows(V, i_b, o_n, i_h, o_d, stride_xb, stride_xn, stride_xh, UNIT), mask, HALF)
        qa, qb = _turn(qa, qb, m_row, Q_WEIGHT, w_qa, w_qb, COS, cos, sin, eps, D)
        p_q = _rows(YQ, i_b, o_n, i_h, o_d, stride_yb, stride_yn, stride_yh, UNIT)
        _store(p_q, mask, qa, qb, HALF)
        ka, kb = _turn(ka, kb, m_row, K_WEIGHT, w_ka, w_kb, COS, cos, sin, eps, D)
        p_k = _rows(YK, i_b, o_n, i_h, o_d, stride_yb, stride_yn, stride_yh, UNIT)
        _store(p_k, mask, ka, kb, HALF)
        if V is not None:
            p_v = _rows(YV, i_b, o_n, i_h, o_d, stride_yb, stride_yn, stride_yh, UNIT)
            _store(p_v, mask, va, vb, HALF)


@triton.jit
def _heads_back(
    G, X, DX, WEIGHT, p_sum, GV, DV, COS, cos, sin, i_b, o_n, first, end, N, eps,
    stride_gb, stride_gn, stride_gh, stride_gvb, stride_gvn, stride_gvh,
    stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx of some heads of queries or keys, and their dw. With GV, dv of these heads as well."""
    HALF: tl.constexpr = D // 2
    o_d = tl.arange(0, WIDTH)
    m_row = (o_n < N)[:, None]
    mask = m_row & (o_d < HALF)[None, :]
    wa, wb = _weight(WEIGHT, o_d, HALF)
    sum_a = tl.zeros(mask.shape, tl.float32)
    sum_b = tl.zeros(mask.shape, tl.float32)
    for i_h in range(first, end):
        # All loads come before the first store, beyond which the compiler may not move them.
        a, b = _load(_rows(G, i_b, o_n, i_h, o_d, stride_gb, stride_gn, stride_gh, UNIT), mask, HALF)
        xa, xb = a, b
        if WEIGHT is not None:
            xa, xb = _load(_rows(X, i_b, o_n, i_h, o_d, stride_xb, stride_xn, stride_xh, UNIT), mask, HALF)
        if GV is not None:
            p_v = _rows(GV, i_b, o_n, i_h, o_d, stride_gvb, stride_gvn, stride_gvh, UNIT)
            va, vb = _load(p_v, mask, HALF)
        a, b, sum_a, sum_b = _turn_back(
            a, b, xa, xb, m_row, WEIGHT, wa, wb, COS, cos, sin, eps, sum_a, sum_b, D
        )
        _store(_rows(DX, i_b, o_n, i_h, o_d, stride_yb, stride_yn, stride_yh, UNIT), mask, a, b, HALF)
        if GV is not None:
            p_v = _rows(DV, i_b, o_n, i_h, o_d, stride_yb, stride_yn, stride_yh, UNIT)
            _store(p_v, mask, va, vb, HALF)
    if WEIGHT is not None:
        _store(p_sum + o_d, o_d < HALF, tl.sum(sum_a, 0), tl.sum(sum_b, 0), HALF)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    GQ, GK, GV, Q, K, DQ, DK, DV, Q_WEIGHT, K_WEIGHT, COS, SIN, SUMS,
    stride_gqb, stride_gqn, stride_gqh, stride_gkb, stride_gkn, stride_gkh,
    stride_gvb, stride_gvn, stride_gvh, stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh,
    N, H, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """SUMS (programs, 2, D) fp32 takes a program's dw of queries and keys. GV and DV may be None together.

    Queries come before keys, rather than both head by head, which takes more registers than there are.
    """
    i_b, o_n, first, end = _place(N, H, TOKENS, HEADS)
    HALF: tl.constexpr = D // 2
    o_d = tl.arange(0, WIDTH)
    cos, sin = _angles(COS, SIN, o_n, o_d, (o_n < N)[:, None] & (o_d < HALF)[None, :], HALF)
    p_sum = SUMS + tl.program_id(0).to(tl.int64) * (2 * D)
    _heads_back(
        GQ, Q, DQ, Q_WEIGHT, p_sum, None, None, COS, cos, sin, i_b, o_n, first, end, N, eps,
        stride_gqb, stride_gqn, stride_gqh, stride_gvb, stride_gvn, stride_gvh,
        stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh, D, WIDTH, UNIT,
    )  # fmt: skip
    _heads_back(
        GK, K, DK, K_WEIGHT, p_sum + D, GV, DV, COS, cos, sin, i_b, o_n, first, end, N, eps,
        stride_gkb, stride_gkn, stride_gkh, stride_gvb, stride_gvn, stride_gvh,
        stride_xb, stride_xn, stride_xh, stride_yb, stride_yn, stride_yh, D, WIDTH, UNIT,
    )  # fmt: skip


class _Launch(NamedTuple):
    """Threads of a program, each with one vector of each half at a time, and heads, one after the other."""

    threads: int
    heads: int


# Not timed. No kernel spills, by `dtrain.kernels.aot` with Triton 3.6 and 3.9.
_WARPS = 4
_LAUNCH = {arch: _Launch(_WARPS * (64 if arch.startswith("gfx") else 32), heads=8) for arch in SHARED_BYTES}


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    if dtype not in _DTYPES:
        return f"{dtype} is none of float16, bfloat16 and float32"
    if head_dim % 2 or head_dim > 256:
        return f"head dim {head_dim} is not even, or above 256"
    return ""


def _contiguous(how: NormRope) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in how[:4]]


def _strides(tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
    """UNIT and the strides of (B, N, H) in it; that of a dim of size 1 is arbitrary, so 0 will do."""
    strides = [s if n > 1 else 0 for x in tensors for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    unit = math.gcd(_unit(tensors[0].shape[-1]), *strides)
    return unit, [s // unit for s in strides]


def _unit(head_dim: int) -> int:
    """UNIT by the head dim alone: both halves start at a multiple of it, or they would be laid out unlike."""
    return math.gcd(8, head_dim // 2)


def _constants(arch: str, head_dim: int, unit: int) -> dict[str, Any]:
    launch = _LAUNCH[known_arch(arch)]
    width = 1 << (head_dim // 2 - 1).bit_length()
    tokens = max(1, launch.threads * _unit(head_dim) // width)
    return {"D": head_dim, "WIDTH": width, "UNIT": unit, "TOKENS": tokens, "HEADS": launch.heads}


_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": True}


def _grid(x_BNHD: Tensor, constants: dict[str, Any]) -> int:
    batch, tokens, heads, _ = x_BNHD.shape
    return batch * int(-(-tokens // constants["TOKENS"]) * -(-heads // constants["HEADS"]))


def forward(qkv: Tensor, how: NormRope, outputs: Sequence[Tensor]) -> None:
    """Write normed and rotated queries and keys; with a third output the values, as they are.

    Args:
        qkv: (B, N, 3, H, D) that `check` and `refusal` let pass.
        outputs: two or three (B, N, H, D) with the same strides, of which the last is 1.
    """
    slots = readable(qkv).unbind(2)[: len(outputs)]
    arch = arch_of(qkv.device)
    unit, strides = _strides([slots[0], outputs[0]])
    constants = _constants(arch, qkv.shape[-1], unit)
    absent = [None] * (3 - len(outputs))
    with torch.cuda.device_of(qkv):
        _forward_kernel[(_grid(slots[0], constants),)](
            *slots, *absent, *outputs, *absent, *_contiguous(how), *strides, *slots[0].shape[1:3], how.eps,
            **constants, **_OPTIONS,
        )  # fmt: skip


def backward(
    grads: Sequence[Tensor], qkv: Tensor | None, how: NormRope, grad_qkv: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients by qkv, and return those by the weights, of what `forward` gave.

    Args:
        grads: by two or three outputs of `forward`, (B, N, H, D) with any strides. Each may be the slot of
            `grad_qkv` that it becomes.
        qkv: as `forward` was given it; None will do without weights.
        grad_qkv: (B, N, 3, H, D), rows contiguous. Without a third gradient the slot of the values is left.
    """
    grads = [readable(g) for g in grads]
    absent = [None] * (3 - len(grads))
    slots = None if qkv is None else readable(qkv).unbind(2)
    targets = grad_qkv.unbind(2)
    arch = arch_of(grad_qkv.device)
    unit, strides = _strides([*grads, *grads[: len(absent)], slots[0] if slots else grads[0], targets[0]])
    constants = _constants(arch, grad_qkv.shape[-1], unit)
    programs = _grid(grads[0], constants)
    sums = grad_qkv.new_empty(programs, 2, grad_qkv.shape[-1], dtype=torch.float32)
    with torch.cuda.device_of(grad_qkv):
        _backward_kernel[(programs,)](
            *grads, *absent, *(slots[:2] if slots else (None, None)), *targets[: len(grads)], *absent,
            *_contiguous(how), sums, *strides, *grads[0].shape[1:3], how.eps, **constants, **_OPTIONS,
        )  # fmt: skip
    return tuple(
        None if weight is None else sums[:, i].sum(0).to(weight.dtype)
        for i, weight in enumerate((how.q_weight, how.k_weight))
    )  # type: ignore[return-value]


def aot_cases() -> Iterator[AotCase]:
    """Norm and rotation, with and without the values, at the head dims that models use, in bf16."""
    kernels = {"forward": (_forward_kernel, ("V", "YV")), "backward": (_backward_kernel, ("GV", "DV"))}
    for arch in SHARED_BYTES:
        for name, (kernel, values) in kernels.items():
            for head_dim in (64, 72, 96, 128):
                constants = _constants(arch, head_dim, _unit(head_dim))
                yield _case(f"qk_norm_rope.{name} D={head_dim}", kernel, arch, constants)
                constants = constants | dict.fromkeys(values)
                yield _case(f"qk_norm_rope.{name} D={head_dim} without values", kernel, arch, constants)


def _case(name: str, kernel: Any, arch: str, constants: dict[str, Any]) -> AotCase:
    signature = {x: _type(x) for x in kernel.arg_names if x not in constants}
    return AotCase(
        name=name,
        kernel=kernel,
        arch=arch,
        signature=signature,
        constexprs=constants,
        divisible=tuple(x for x, kind in signature.items() if kind.startswith("*")),
        options=_OPTIONS,
        tensor_cores=False,
    )


def _type(argument: str) -> str:
    if argument in ("COS", "SIN", "SUMS"):
        return "*fp32"
    if argument == "eps":
        return "fp32"
    return "i32" if argument in _SIZES else "*bf16"
