"""What quantised numbers look like on the wire: formats, sizes, and where codes and scales lie.

A tensor of n elements is cut into blocks of B consecutive ones, the last of which may be partial: what is
missing there counts as zero. Each block has integer or eight-bit float codes c and one bf16 scale s, and
stands for c·s. A payload is one uint8 tensor

    [ codes of all blocks | their scales | zeros up to a multiple of 16 bytes ]

whose parts start at multiples of 16 bytes: it travels in one collective and is read 16 bytes at a time.
Codes of 8 bits take a byte each, in the order of the elements. Those of 4 bits are stored as c + 8: element i
of the block's first half in the lower half of byte i, element i of its second half in the upper.

    bits of an element = bits of a code + 16 / B        8.125 and 4.125 at B = 128

With a rotation the elements are first replaced by their Hadamard transform, group by group, which spreads an
outlier over its group. Sources: Dettmers et al., arXiv 2110.02861, on blocks; Jia et al., "SDP4Bit", arXiv
2410.15526, on rotations.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Bits", "Format", "Parts", "format_of", "parts", "payload_bytes", "residual_numel"]

Bits = Literal["int8", "fp8", "int4"]
ALIGNMENT = 16  # bytes, of a payload and of its parts

_LARGEST = {"int8": 127, "fp8": 448, "int4": 7}
_BLOCKS = (32, 64, 128, 256, 512)
_ROTATIONS = (0, 32, 64, 128)


@dataclass(frozen=True)
class Format:
    """How numbers are written.

    Args:
        bits: "int8" and "int4" are evenly spaced codes, "fp8" is e4m3.
        block: elements that share a scale: a power of two from 32 to 512.
        rotation: order of the orthonormal Hadamard transform of consecutive groups, 32, 64 or 128 and at most
            `block`; 0 for none.
    Raises:
        ValueError: there is no such format.
    """

    bits: Bits
    block: int = 128
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ValueError(f"bits = {self.bits!r}: must be one of 'int8', 'fp8', 'int4'")
        if self.block not in _BLOCKS:
            raise ValueError(f"block = {self.block}: must be a power of two from 32 to 512")
        if self.rotation not in _ROTATIONS or self.rotation > self.block:
            raise ValueError(
                f"rotation = {self.rotation}: must be 0, 32, 64 or 128 and at most block = {self.block}"
            )

    @property
    def largest(self) -> int:
        """The largest code."""
        return _LARGEST[self.bits]

    @property
    def code_bytes(self) -> int:
        """Bytes that the codes of a block take."""
        return self.block // 2 if self.bits == "int4" else self.block

    def blocks(self, n: int) -> int:
        """How many blocks n elements take."""
        return -(-n // self.block)


@functools.cache
def format_of(bits: Bits, block: int, rotation: int) -> Format:
    """The format of these three, as operators pass it."""
    return Format(bits, block, rotation)


def payload_bytes(n: int, format: Format) -> int:
    """Bytes of a payload of n elements."""
    blocks = format.blocks(n)
    return blocks * format.code_bytes + _aligned(2 * blocks)


def residual_numel(n: int, format: Format) -> int:
    """Elements of a residual that is a tensor: n, with a rotation n rounded up to whole groups.

    A rotation spreads the last elements over all of their group.
    """
    group = format.rotation or 1
    return -(-n // group) * group


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Parts(NamedTuple):
    """Views of a payload.

    Args:
        codes: (blocks, code bytes) uint8.
        scales: (blocks,) int16, the bits of bf16 numbers.
        padding: the bytes behind them.
    """

    codes: Tensor
    scales: Tensor
    padding: Tensor


def parts(payload: Tensor, n: int, format: Format) -> Parts:
    """The parts of a payload of n elements."""
    blocks = format.blocks(n)
    codes, scales, padding = payload.split(
        [
            blocks * format.code_bytes,
            2 * blocks,
            _aligned(2 * blocks) - 2 * blocks,
        ]
    )
    return Parts(codes.view(blocks, format.code_bytes), scales.view(torch.int16), padding)
