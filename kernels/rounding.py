"""Stochastic rounding, and floats of eight bits, by integer arithmetic on the bits of fp32.

Random bits are Philox 4x32-10 words (Salmon et al., SC 2011): element i of a stream has word i mod 4 of
counter i div 4, under the stream's 64-bit seed. So an element's bits depend on nothing but (seed, i): not on
the grid, on how a tensor is cut into shards, or on the device. Rounding up with the probability of the
distance makes a rounded value right on average.

A minifloat here is a magnitude of E exponent and M mantissa bits without infinities; subnormals included. It
is an fp32 number cut to M mantissa bits whose exponent field counts from another zero, so that one
multiplication by a power of two brings both encodings together, subnormals as well, and integer rounding of
the bits carries into the exponent as it should.

In a kernel every function takes and gives blocks (G, W); the plain ones take tensors of any shape.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.kernels.launch import tl, triton

__all__ = [
    "Runs", "from_minifloat", "mix", "random_bits", "random_bits_at", "round_bf16", "stochastic_bf16",
    "to_minifloat", "words",
]  # fmt: skip

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def mix(*numbers: int) -> int:
    """One seed below 2^63 from several integers, such as (run's seed, step, parameter).

    By the finaliser of SplitMix64 (Steele et al., OOPSLA 2014): near numbers give unrelated seeds.
    """
    state = 0
    for number in numbers:
        state = (state + _GOLDEN + number) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def words(seed: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random words of elements `first`, …, `first + count - 1`: (count,) int64 in [0, 2^32).

    Args:
        seed: of the stream, in [0, 2^63).
        first: element index, at least 0.
    """
    counter = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=device)
    return _philox(seed, counter).flatten()[first % 4 :][:count]


def _philox(seed: int, counter: Tensor) -> Tensor:
    """The words (n, 4) of counters (n,) int64."""
    c0, c1 = counter & _MASK, counter >> 32
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps at 64 bits, of which all are right
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


class Runs(NamedTuple):
    """Where the elements of a part lie in the whole tensor: runs of consecutive ones, each `pitch` on.

    A part that is cut along dim 0 is one run; one of (N, D) along dim 1 has N, each D on.
    """

    first: int
    run: int
    pitch: int

    def words(self, seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Random words (count,) of the part's elements `start`, …, see `words`."""
        if start + count <= self.run or self.run == self.pitch:
            return words(seed, self.first + start, count, device)
        element = torch.arange(start, start + count, device=device)
        place = self.first + element // self.run * self.pitch + element % self.run
        return _philox(seed, place // 4).gather(1, (place % 4)[:, None]).flatten()


def stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """x in bf16, up or down by chance; infinities and NaN as they are.

    Args:
        x: fp32.
        noise: `words`, of x's shape.
    """
    bits = x.view(torch.int32)
    rounded = (bits + (noise >> 16).to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), rounded, bits).view(torch.float32).to(torch.bfloat16)


@triton.jit
def random_bits(seed, counter, WIDTH: tl.constexpr):
    """Words as (G, WIDTH) uint32; `counter` (G,) int64 holds each row's first element index divided by 4."""
    o_four = tl.arange(0, WIDTH // 4)
    r0, r1, r2, r3 = tl.randint4x(seed, counter[:, None] + o_four[None, :])
    joined = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (G, W/4, 2, 2), the last axis counting by two
    return tl.reshape(joined, [counter.shape[0], WIDTH])


@triton.jit
def random_bits_at(seed, place):
    """Words of elements anywhere, (G, W) int64, as uint32: four times the work of `random_bits`."""
    r0, r1, r2, r3 = tl.randint4x(seed, place >> 2)
    lane = place & 3
    return tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))


@triton.jit
def round_bf16(x, noise):
    """fp32 whose lower half is zero, up or down by chance: bf16 by a cast that rounds no more."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + (noise >> 16).to(tl.int32)) & -65536
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def to_minifloat(x, noise, FACTOR: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr):
    """Code of |x|, int32 in 0 … LARGEST: rounded by chance, or to nearest even without noise; x is finite.

    FACTOR is 2^(b - 127) where 2^k has the exponent field k + b: it takes x to the fp32 number of that field.
    What lies beyond LARGEST becomes it.
    """
    bits = (tl.abs(x) * FACTOR).to(tl.int32, bitcast=True)
    DROPPED: tl.constexpr = 23 - MANTISSA
    if noise is None:
        bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    else:
        bits += (noise >> (32 - DROPPED)).to(tl.int32)
    return tl.minimum(bits >> DROPPED, LARGEST)


@triton.jit
def from_minifloat(code, FACTOR: tl.constexpr, MANTISSA: tl.constexpr):
    """The magnitude of a code, fp32."""
    return (code.to(tl.int32) << (23 - MANTISSA)).to(tl.float32, bitcast=True) * (1.0 / FACTOR)
