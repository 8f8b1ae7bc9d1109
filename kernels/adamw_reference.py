"""AdamW in eager PyTorch, on one rank's part of each parameter: what the kernel computes, bit for bit.

    p -= lr·wd·p        m = β1·m + (1 - β1)·g        v = β2·v + (1 - β2)·g²
    p -= lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + ε)    e += w·(p - e)

in fp32, every product and sum rounded by itself: no fused multiply-add, so that CPU and GPU agree. Weights p
and averages e may be bf16, rounded by chance. Source: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101

**Moments of eight bits.** A block is 128 consecutive elements of a row, a row one index of dim 0: blocks
never straddle rows, so codes and scales are cut along dim 0 like the parameter. m is a sign and e3m4, v is
e4m4 without a sign, both times a power of two of their block, the least that clips nothing. Why by chance:
with β2 = 0.999 a step changes v by at most a thousandth of it where codes lie 1/16 or 1/32 apart, so rounding
to nearest returns the old code, for ever. Rounding by chance is right on average; and since scales are powers
of two, the grid stays where it is when a scale changes, and a moment that does not change is not rounded
again. A v above zero never becomes code 0, which would divide by ε alone.

**Noise** of an element is a word of Philox that belongs to its place in the whole parameter, rows padded to
whole blocks; so the result does not depend on how the parameter is cut. m and v share a word, turned by 16
bits for v: each uses 19 bits, and the 3 they have in common weigh 2^-16 of a step in one of them. p and e
take the two halves of another.

Shapes: R rows of a shard, L elements of a row, K = ⌈L / 128⌉ blocks of a row.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.kernels.rounding import Runs, mix, stochastic_bf16

__all__ = [
    "BLOCK", "Hyper", "Shard", "Scalars", "blocks_of_row", "decode_first", "decode_second",
    "encode_first", "encode_second", "noise_seed", "scalars", "update",
]  # fmt: skip

BLOCK = 128
MANTISSA = 4
# 2^(b - 127), see `rounding`: 2^0 lies in the highest binade of either format, field 7 or 15.
FIRST_FACTOR, FIRST_LARGEST = 2.0**-120, 0x7F
SECOND_FACTOR, SECOND_LARGEST = 2.0**-112, 0xFF
# Exponent fields of a scale: so that the least code and the inverse of the scale are normal numbers.
LOWEST, HIGHEST = 19, 253

_PIECE = 2**16  # elements that are updated at a time: they stay in the cache


class Shard(NamedTuple):
    """This rank's part of a parameter, and all that is updated with it, in place.

    Args:
        param: fp32 or bf16, contiguous: consecutive indices of dim 0, or what `runs` says.
        exp_avg, exp_avg_sq: of param's shape; fp32, or uint8 codes.
        exp_avg_scale, exp_avg_sq_scale: (R, K) bf16 with codes, else None.
        ema: of param's shape, fp32 or bf16, or None.
        first_row: index along dim 0 of the whole parameter at which this part starts.
        number: of the parameter; tells its noise from that of others.
        runs: places in the whole parameter, of a part that is cut along any dim; not with codes. None: the
            part is consecutive rows from `first_row` on.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    ema: Tensor | None = None
    first_row: int = 0
    number: int = 0
    runs: Runs | None = None

    @property
    def places(self) -> Runs:
        """Of its elements in the whole parameter, where moments are no codes."""
        return self.runs or Runs(self.first_row * self.row, self.param.numel(), self.param.numel())

    @property
    def rows(self) -> int:
        return self.param.shape[0] if self.param.dim() else 1

    @property
    def row(self) -> int:
        """Elements of a row."""
        return math.prod(self.param.shape[1:])

    @property
    def coded(self) -> bool:
        return self.exp_avg.dtype == torch.uint8

    @property
    def random(self) -> bool:
        """Whether anything is rounded by chance."""
        return self.coded or self.random_weights

    @property
    def random_weights(self) -> bool:
        tensors = (self.param,) if self.ema is None else (self.param, self.ema)
        return any(x.dtype == torch.bfloat16 for x in tensors)


class Hyper(NamedTuple):
    """What a step is taken with.

    Args:
        lr, beta1, beta2, eps, weight_decay: of AdamW.
        step: which update of these parameters it is, from 1.
        ema_weight: of the parameters in their averages, 1 - decay.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    ema_weight: float = 0.0


class Scalars(NamedTuple):
    """The numbers of the equations, each rounded to fp32 once."""

    decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    step_size: float
    inverse_root: float
    eps: float
    ema_weight: float


def scalars(how: Hyper) -> Scalars:
    """Computed in double precision."""
    exact = Scalars(
        decay=how.lr * how.weight_decay,
        beta1=how.beta1,
        rest1=1 - how.beta1,
        beta2=how.beta2,
        rest2=1 - how.beta2,
        step_size=how.lr / (1 - how.beta1**how.step),
        inverse_root=1 / math.sqrt(1 - how.beta2**how.step),
        eps=how.eps,
        ema_weight=how.ema_weight,
    )
    return Scalars(*torch.tensor(exact, dtype=torch.float64).float().tolist())


def blocks_of_row(row: int) -> int:
    """K, the blocks and scales of a row."""
    return -(-row // BLOCK)


def noise_seed(seed: int, step: int, number: int) -> int:
    """Of the words that round moments; those for weights have this seed with its lowest bit flipped."""
    return mix(seed, step, number)


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks (…, 128): the scale, NaN where it would not be finite, and its inverse, then 0; (…, 1)."""
    top = x.abs().view(torch.int32).amax(-1, keepdim=True).clamp(max=0x7F800000)
    field = ((top + 0x7FFFF) >> 23).clamp(min=LOWEST)  # up to the next four bits, or the largest would clip
    broken = field > HIGHEST
    scale = torch.where(broken, 0x7FC00000, field << 23).to(torch.int32).view(torch.float32)
    inverse = torch.where(broken, 0, (254 - field) << 23).to(torch.int32).view(torch.float32)
    return scale, inverse


def _codes(x: Tensor, inverse: Tensor, noise: Tensor, factor: float, largest: int) -> Tensor:
    """Codes of |x|, int32, see `rounding.to_minifloat`."""
    bits = (x.abs() * inverse * factor).view(torch.int32) + (noise >> (9 + MANTISSA)).to(torch.int32)
    return (bits >> (23 - MANTISSA)).clamp(max=largest)


def _magnitudes(codes: Tensor, factor: float) -> Tensor:
    return (codes.to(torch.int32) << (23 - MANTISSA)).view(torch.float32) * (1 / factor)


def encode_first(m: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """First moments as codes and scales.

    Args:
        m: blocks (…, 128) fp32.
        noise: `rounding.words` of them.
    Returns: codes (…, 128) uint8 and scales (…) bf16.
    """
    scale, inverse = _scale(m)
    codes = _codes(m, inverse, noise, FIRST_FACTOR, FIRST_LARGEST)
    sign = (m.view(torch.int32) >> 24) & 0x80
    return (codes | sign).to(torch.uint8), scale.squeeze(-1).bfloat16()


def decode_first(codes: Tensor, scales: Tensor) -> Tensor:
    """What `encode_first` coded, fp32."""
    codes = codes.to(torch.int32)
    magnitude = _magnitudes(codes & 0x7F | (codes & 0x80) << 5, FIRST_FACTOR)  # the sign comes to bit 31
    return magnitude * scales.float()[..., None]


def encode_second(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments, none below zero, as codes and scales; see `encode_first`."""
    scale, inverse = _scale(v)
    codes = _codes(v, inverse, ((noise << 16) | (noise >> 16)) & 0xFFFFFFFF, SECOND_FACTOR, SECOND_LARGEST)
    return torch.maximum(codes, (v > 0).to(torch.int32)).to(torch.uint8), scale.squeeze(-1).bfloat16()


def decode_second(codes: Tensor, scales: Tensor) -> Tensor:
    """What `encode_second` coded, fp32."""
    return _magnitudes(codes, SECOND_FACTOR) * scales.float()[..., None]


class _Piece(NamedTuple):
    """Views (rows, elements) of some of a shard's rows, or (1, elements) of some of its elements."""

    shard: Shard
    grad: Tensor
    places: Runs
    start: int
    """Of its first element, in `places`."""

    def noise(self, seed: int) -> Tensor:
        """Words of its elements, rows of codes padded to whole blocks: (rows, elements)."""
        rows, width = self.grad.shape
        if self.shard.coded:
            width = blocks_of_row(width) * BLOCK
        return self.places.words(seed, self.start, rows * width, self.grad.device).view(rows, width)


def _pieces(shard: Shard, grad: Tensor) -> Iterator[_Piece]:
    rows, row = (shard.rows, shard.row) if shard.coded else (1, shard.param.numel())
    tensors = [x if x is None else x.reshape(rows, -1) for x in (*shard[:6], grad)]
    if shard.coded:
        padded = blocks_of_row(row) * BLOCK
        places = Runs(shard.first_row * padded, rows * padded, rows * padded)
        step = max(1, _PIECE // row)
        for i in range(0, rows, step):
            *parts, part = [x if x is None else x[i : i + step] for x in tensors]
            yield _Piece(Shard(*parts), part, places, i * padded)  # type: ignore[arg-type]
    else:
        for i in range(0, row, _PIECE):
            *parts, part = [x if x is None else x[:, i : i + _PIECE] for x in tensors]
            yield _Piece(Shard(*parts), part, shard.places, i)  # type: ignore[arg-type]


def _blocks(x: Tensor) -> Tensor:
    """(R, L) as (R, K, 128), padded with zeros."""
    width = x.shape[1]
    padded = blocks_of_row(width) * BLOCK
    if padded != width:
        x = torch.nn.functional.pad(x, (0, padded - width))
    return x.view(len(x), -1, BLOCK)


def _unblocked(x: Tensor, width: int) -> Tensor:
    return x.flatten(1)[:, :width]


def update(
    shard: Shard, grad: Tensor, numbers: Scalars, *, seed: int, grad_scale: Tensor | None = None
) -> None:
    """One step of one shard, in place.

    Args:
        grad: of the parameter's shape, fp32 or bf16.
        numbers: see `scalars`.
        seed: see `noise_seed`.
        grad_scale: multiplies the gradient; one fp32 number on the device.
    """
    for piece in _pieces(shard, grad):
        g = piece.grad.float() if grad_scale is None else piece.grad.float() * grad_scale
        param = _update_piece(piece, g, numbers, seed)
        _store_weights(piece, param, numbers, seed)


def _update_piece(piece: _Piece, grad: Tensor, numbers: Scalars, seed: int) -> Tensor:
    """Write the moments; returns the parameters in fp32."""
    shard, (rows, width) = piece.shard, grad.shape
    if shard.coded:
        assert shard.exp_avg_scale is not None
        assert shard.exp_avg_sq_scale is not None
        m = _unblocked(decode_first(_blocks(shard.exp_avg), shard.exp_avg_scale), width)
        v = _unblocked(decode_second(_blocks(shard.exp_avg_sq), shard.exp_avg_sq_scale), width)
    else:
        m, v = shard.exp_avg, shard.exp_avg_sq
    m = m * numbers.beta1 + grad * numbers.rest1
    v = v * numbers.beta2 + grad * numbers.rest2 * grad
    if shard.coded:
        noise = piece.noise(seed).view(rows, -1, BLOCK)
        codes, scales = encode_first(_blocks(m), noise)
        shard.exp_avg.copy_(_unblocked(codes, width))
        shard.exp_avg_scale.copy_(scales)  # type: ignore[union-attr]
        codes, scales = encode_second(_blocks(v), noise)
        shard.exp_avg_sq.copy_(_unblocked(codes, width))
        shard.exp_avg_sq_scale.copy_(scales)  # type: ignore[union-attr]
    else:
        shard.exp_avg.copy_(m)
        shard.exp_avg_sq.copy_(v)
    param = shard.param.float()
    param = param - param * numbers.decay
    root = v.double().sqrt().float()  # that of fp32 is off by one rounding on the CPU
    return param - m * numbers.step_size / (root * numbers.inverse_root + numbers.eps)


def _store_weights(piece: _Piece, param: Tensor, numbers: Scalars, seed: int) -> None:
    """Write parameters, and averages with what was written."""
    shard = piece.shard
    noise = piece.noise(seed ^ 1)[:, : param.shape[1]] if shard.random_weights else None
    shard.param.copy_(_rounded(param, noise, shard.param.dtype))
    if shard.ema is not None:
        ema = shard.ema.float()
        ema = ema + (shard.param.float() - ema) * numbers.ema_weight
        other_half = None if noise is None else (noise & 0xFFFF) << 16
        shard.ema.copy_(_rounded(ema, other_half, shard.ema.dtype))


def _rounded(x: Tensor, noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return x
    assert noise is not None
    return stochastic_bf16(x, noise)
