"""Quantisation in eager PyTorch: the definition that kernels and `quantize_cpu` are held to.

    v = H(x - minus) + residual         s = max|v| / largest code, of each block, rounded up to bf16
    c = round(v · (1/s))                residual = v - c·s              decoded: H(c·s)

where H is the orthonormal Hadamard transform of consecutive groups, its own inverse, or nothing. Each step is
rounded to fp32 by itself, and c·s is exact: codes have at most 8 significant bits, scales have 8. H takes
sums and differences of pairs 1, 2, 4, … apart, in this order. So what does the same steps gives the same bits
on every machine; only the kernels of a GPU, which multiply with a matrix, sum in another order in H.

A block of zeros, or below 2^-110, has scale 1. One that holds NaN, infinity or 2^127 and more has scale NaN:
it decodes to NaN on every rank, and its residual starts again from zero. Rounding by chance goes up with the
probability of the distance, by the element's own word of noise (`rounding.words`).

Functions take rows (m, ...), each a tensor of its own. One is walked in pieces that stay in a core's cache,
with buffers made once: it is read from memory once, however many passes the arithmetic takes.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.kernels.payload import Format, Parts, parts
from dtrain.kernels.rounding import words

__all__ = ["HUGE", "TINY", "decode_add", "decode_sum", "decode_sum_encode", "encode"]

TINY = 2.0**-110  # a largest magnitude below it counts as zero
HUGE = 2.0**127  # from here on it counts as infinite: its scale, rounded up, could decode to infinity
_PIECE = 2**18  # elements for a core: two buffers of 1 MiB, in its caches, and calls cost little beside them

_NAN = 0x7FC00000  # bits
_E4M3 = 2.0**-120  # see `rounding.to_minifloat`


class _Piece(NamedTuple):
    """Some consecutive blocks, and two buffers with room for them."""

    start: int
    blocks: int
    block: int
    buffers: tuple[Tensor, Tensor]

    def of(self, x: Tensor) -> Tensor:
        """Its elements of a tensor (n,), fewer where that ends."""
        return x[self.start * self.block : (self.start + self.blocks) * self.block]

    def cut(self, rows: Tensor) -> Tensor:
        """Its rows of a tensor (blocks, ...)."""
        return rows[self.start : self.start + self.blocks]

    def views(self) -> tuple[Tensor, Tensor]:
        """Both buffers as (blocks, B)."""
        a, b = (x[: self.blocks * self.block].view(self.blocks, self.block) for x in self.buffers)
        return a, b


def _pieces(n: int, format: Format, device: torch.device) -> Iterator[_Piece]:
    total, block = format.blocks(n), format.block
    most = _PIECE * torch.get_num_threads() if device.type == "cpu" else n
    blocks = max(1, min(total, most // block))
    a, b = torch.empty(2, blocks * block, device=device)
    for start in range(0, total, blocks):
        yield _Piece(start, min(blocks, total - start), block, (a, b))


class _Written(NamedTuple):
    """What was written of a piece.

    Args:
        codes: (blocks, code bytes) uint8.
        scales: (blocks, 1) fp32.
        poisoned: (blocks,) where scales are NaN; None where none is.
    """

    codes: Tensor
    scales: Tensor
    poisoned: Tensor | None


def _row(x: Tensor | None, i: int) -> Tensor | None:
    return None if x is None else x[i]


def _start(i: int, first: int, n: int, format: Format) -> int:
    """Of row i in the stream of the seed: rows are as many whole blocks apart as they have."""
    return first + i * format.blocks(n) * format.block


def encode(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None, format: Format,
    seed: int | None, first: int,
) -> None:  # fmt: skip
    """Write the payloads of x, and the new residuals in place of the old; see `quantize.encode`."""
    for i in range(len(x)):
        start = _start(i, first, x.shape[1], format)
        _encode_row(x[i], payload[i], _row(minus, i), _row(residual, i), format, seed, start)


def _encode_row(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None, format: Format,
    seed: int | None, first: int,
) -> None:  # fmt: skip
    out = parts(payload, x.numel(), format)
    out.padding.zero_()
    kept = None if residual is None else _Residual(residual, x.numel(), format.block)
    for piece in _pieces(x.numel(), format, x.device):
        v, scratch = _difference(piece, x, minus, own=kept is not None or format.rotation > 0)
        if format.rotation:
            v, scratch = _rotate(v, scratch, format.rotation)
        _encode(piece, v, scratch, out, format, kept, seed, first)


def _difference(piece: _Piece, x: Tensor, minus: Tensor | None, own: bool) -> tuple[Tensor, Tensor]:
    """x - minus as (blocks, B) in fp32, zero where x has ended, and a buffer that is free."""
    x = piece.of(x)
    v, scratch = piece.views()
    if x.dtype == torch.float32 and x.numel() == v.numel() and minus is None and not own:
        return x.view_as(v), scratch
    flat = v.view(-1)
    flat[: x.numel()].copy_(x)
    flat[x.numel() :].zero_()
    if minus is not None:
        flat[: x.numel()].sub_(piece.of(minus))
    return v, scratch


class _Residual:
    """The errors of earlier calls, as a tensor or as an int8 payload."""

    def __init__(self, residual: Tensor, n: int, block: int) -> None:
        self.residual, self.format = residual, Format("int8", block)
        self.payload = None
        if residual.dtype == torch.uint8:
            self.payload = parts(residual, n, self.format)
            self.scales = _scales(self.payload)
            self.payload.padding.zero_()

    def add(self, piece: _Piece, v: Tensor, scratch: Tensor) -> None:
        """To v (blocks, B)."""
        if self.payload is None:
            old = piece.of(self.residual)
            v.view(-1)[: old.numel()].add_(old)
        else:
            codes = _from_codes(piece.cut(self.payload.codes), self.format, scratch)
            v.addcmul_(codes, piece.cut(self.scales))

    def replace(self, piece: _Piece, v: Tensor, scratch: Tensor) -> None:
        """By v (blocks, B)."""
        if self.payload is None:
            new = piece.of(self.residual)
            new.copy_(v.view(-1)[: new.numel()])
        else:
            _quantise(piece, v, scratch, self.payload, self.format, None, 0)


def _encode(
    piece: _Piece, v: Tensor, scratch: Tensor, out: Parts, format: Format, kept: _Residual | None,
    seed: int | None, first: int,
) -> None:  # fmt: skip
    """Write codes and scales of v (blocks, B) plus the residual, and the new residual; v is overwritten."""
    if kept is None:
        _quantise(piece, v, scratch, out, format, seed, first)
        return
    kept.add(piece, v, scratch)
    written = _quantise(piece, v, scratch, out, format, seed, first)
    v.addcmul_(_from_codes(written.codes, format, scratch), written.scales, value=-1)
    if written.poisoned is not None:
        v.masked_fill_(written.poisoned[:, None], 0.0)
    kept.replace(piece, v, scratch)


def _quantise(
    piece: _Piece, v: Tensor, scratch: Tensor, out: Parts, format: Format, seed: int | None, first: int
) -> _Written:
    """Write codes and scales of v (blocks, B), which stays as it is."""
    amax = torch.abs(v, out=scratch).amax(dim=1)
    scales = torch.mul(amax, _scalar(1 / format.largest, torch.float32, v.device))
    bits = scales.view(torch.int32).add_(_scalar(0xFFFF, torch.int32, v.device))
    bits.bitwise_and_(_scalar(-0x10000, torch.int32, v.device))
    poisoned = None
    low, high = (float(x) for x in amax.aminmax())
    if not (low >= TINY and high < HUGE):  # NaN as well
        scales.masked_fill_(amax < TINY, 1.0)
        poisoned = ~(amax < HUGE)
        bits.masked_fill_(poisoned, _NAN)
    piece.cut(out.scales).copy_(scales.view(torch.int16)[1::2])
    t = torch.mul(v, scales.reciprocal()[:, None], out=scratch)
    if poisoned is not None:
        t.masked_fill_(poisoned[:, None], 0.0)
    noise = None
    if seed is not None:
        noise = words(seed, first + piece.start * piece.block, t.numel(), t.device).view_as(t)
    codes = piece.cut(out.codes)
    _to_codes(t, noise, format, codes)
    return _Written(codes, scales[:, None], poisoned)


@functools.cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor of its dtype: PyTorch would convert a Python number at every call."""
    return torch.tensor(value, dtype=dtype, device=device)


def _to_codes(t: Tensor, noise: Tensor | None, format: Format, codes: Tensor) -> None:
    """Round t, which is overwritten, and write codes."""
    if format.bits == "fp8":
        _to_e4m3(t, noise, codes)
        return
    if noise is None:
        t.round_()
    else:  # in units of 2^-23, which t from 1 on is a multiple of
        fixed = t.mul_(2.0**23).to(torch.int32).add_((noise >> 9).to(torch.int32))
        t.copy_(fixed.bitwise_right_shift_(23).clamp_(-format.largest, format.largest))
    if format.bits == "int4":
        a, b = t.chunk(2, dim=1)
        codes.view(torch.int8).copy_(a.add_(b, alpha=16))
        codes.add_(0x88)  # both are stored as c + 8
    else:
        codes.view(torch.int8).copy_(t)


def _to_e4m3(t: Tensor, noise: Tensor | None, codes: Tensor) -> None:
    if noise is None:
        codes.view(torch.float8_e4m3fn).copy_(t)
        return
    bits = (t.abs() * _E4M3).view(torch.int32).add_((noise >> 12).to(torch.int32))
    magnitude = bits.bitwise_right_shift_(20).clamp_(max=0x7E)
    codes.copy_(magnitude.bitwise_or_((t.view(torch.int32) >> 24).bitwise_and_(0x80)))


def _from_codes(codes: Tensor, format: Format, out: Tensor) -> Tensor:
    """The numbers that codes are, in fp32."""
    if format.bits == "int8":
        out.copy_(codes.view(torch.int8))
    elif format.bits == "int4":
        a, b = out.chunk(2, dim=1)
        a.copy_((codes & 15).view(torch.int8).sub_(8))
        b.copy_((codes >> 4).view(torch.int8).sub_(8))
    else:
        bits = out.view(torch.int32).copy_(codes.view(torch.int8))
        bits.bitwise_left_shift_(20).bitwise_and_(0x07F00000 - 2**31)  # magnitude and sign
        out.mul_(1 / _E4M3)
    return out


def _scales(of: Parts) -> Tensor:
    """(blocks, 1) fp32."""
    return of.scales.view(torch.bfloat16).float()[:, None]


def decode_sum(payloads: Tensor, out: Tensor, divide: float, format: Format) -> None:
    """Write H(Σ c·s / divide), see `quantize.decode_sum`."""
    for i in range(len(out)):
        _decode_sum_row(payloads[:, i], out[i], divide, format)


def _decode_sum_row(payloads: Tensor, out: Tensor, divide: float, format: Format) -> None:
    in_place = out.dtype == torch.float32 and not format.rotation
    for piece, total, scratch in _sums(payloads, out.numel(), divide, format, out if in_place else None):
        if format.rotation:
            total, _ = _rotate(total, scratch, format.rotation)
        target = piece.of(out)
        if target.data_ptr() != total.data_ptr():
            target.copy_(total.view(-1)[: target.numel()])


def _sums(
    payloads: Tensor, n: int, divide: float, format: Format, out: Tensor | None = None
) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
    """Of each piece Σ c·s / divide as (blocks, B), in `out` where blocks are whole, and a free buffer."""
    sources = [(of.codes, _scales(of)) for of in (parts(p, n, format) for p in payloads.unbind())]
    for piece in _pieces(n, format, payloads.device):
        total, scratch = piece.views()
        if out is not None and piece.of(out).numel() == total.numel():
            total = piece.of(out).view_as(total)
        for i, (codes, scales) in enumerate(sources):
            if i == 0:
                _from_codes(piece.cut(codes), format, total).mul_(piece.cut(scales))
            else:
                total.addcmul_(_from_codes(piece.cut(codes), format, scratch), piece.cut(scales))
        if divide != 1:
            total.mul_(1 / divide)
        yield piece, total, scratch


def decode_sum_encode(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, n: int, divide: float,
    format_in: Format, format_out: Format, seed: int | None, first: int,
) -> None:  # fmt: skip
    """`decode_sum` and `encode` in one, see `quantize.decode_sum_encode`."""
    for i in range(len(payload)):
        start, formats = _start(i, first, n, format_out), (format_in, format_out)
        _decode_sum_encode_row(
            payloads[:, i], payload[i], _row(residual, i), n, divide, *formats, seed, start
        )


def _decode_sum_encode_row(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, n: int, divide: float,
    format_in: Format, format_out: Format, seed: int | None, first: int,
) -> None:  # fmt: skip
    out = parts(payload, n, format_out)
    out.padding.zero_()
    kept = None if residual is None else _Residual(residual, n, format_out.block)
    for piece, v, scratch in _sums(payloads, n, divide, format_in):
        if format_in.rotation != format_out.rotation:
            for order in filter(None, (format_in.rotation, format_out.rotation)):
                v, scratch = _rotate(v, scratch, order)
        _encode(piece, v, scratch, out, format_out, kept, seed, first)


def decode_add(payloads: Tensor, into: Tensor, format: Format) -> None:
    """into += decoded, see `quantize.decode_add`."""
    for i in range(len(into)):
        _decode_add_row(payloads[i], into[i], format)


def _decode_add_row(payload: Tensor, into: Tensor, format: Format) -> None:
    for piece, v, scratch in _sums(payload[None], into.numel(), 1, format):
        if format.rotation:
            v, _ = _rotate(v, scratch, format.rotation)
        target = piece.of(into)
        target.copy_(v.view(-1)[: target.numel()].add_(target))


def _rotate(v: Tensor, scratch: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """H of consecutive groups of v, in one of the two buffers (blocks, B), and the other, which is free."""
    x, y = (b.view(order, -1) for b in (scratch, v))  # groups as columns: what is added is contiguous
    x.copy_(v.view(-1, order).T)
    apart = 1
    while apart < order:
        pairs, out = (b.view(order // (2 * apart), 2, -1) for b in (x, y))
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        x, y = y, x
        apart *= 2
    y.view(-1, order).copy_(x.mul_(order**-0.5).T)
    return y.view_as(v), x.view_as(v)
