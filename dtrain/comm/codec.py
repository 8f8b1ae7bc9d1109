"""Codecs: ways to turn rows of numbers into wire bytes and back.

A row (n,) becomes one payload of `wire_bytes(n)` bytes, scales and padding included, a multiple of 16. Ranks
that decode a payload get the same bits; sums of payloads are formed in fp32 in the order of the ranks, so
they do not depend on how a network is laid out. Formats and kernels: `dtrain.kernels.quantize`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain.kernels import quantize
from dtrain.kernels.payload import ALIGNMENT, Format, payload_bytes, residual_numel

__all__ = ["Cast", "Codec", "Quantised", "aligned"]


def aligned(size: int) -> int:
    """A number of bytes rounded up to where the next part of a message may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Codec(Protocol):
    """One way to write rows.

    `name` is for people, `bits` what a number takes without scales.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    def __hash__(self) -> int: ...

    def wire_bytes(self, n: int) -> int:
        """Bytes of the payload of n numbers."""
        ...

    def encode(
        self, rows: Tensor, out: Tensor, *, minus: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        """Write rows (m, n), less `minus` (m, n), plus `residual`, to payloads (m, `wire_bytes(n)`)."""
        ...

    def decode_sum(self, payloads: Tensor, out: Tensor, divide: float = 1) -> None:
        """Write Σ of payloads (k, m, `wire_bytes(n)`) over k, in fp32 and in order, / divide to (m, n)."""
        ...

    def decode_add(self, payloads: Tensor, into: Tensor) -> None:
        """Add what payloads (m, `wire_bytes(n)`) stand for to (m, n)."""
        ...


@dataclass(frozen=True)
class Cast:
    """Numbers in a floating dtype: the identity in fp32, half the bytes in bf16."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "fp32" if self.dtype == torch.float32 else "bf16"

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def wire_bytes(self, n: int) -> int:
        return aligned(n * self.dtype.itemsize)

    def encode(
        self, rows: Tensor, out: Tensor, *, minus: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        if residual is not None:
            raise ValueError(f"error feedback is for quantised gradients: {self.name} keeps no residual")
        numbers = self._numbers(out, rows.shape[-1])
        numbers.copy_(rows if minus is None else rows.float() - minus)

    def decode_sum(self, payloads: Tensor, out: Tensor, divide: float = 1) -> None:
        first, *rest = (self._numbers(p, out.shape[-1]) for p in payloads)
        if out.dtype == torch.float32 or not (rest or divide != 1):
            total = out.copy_(first)
        else:
            total = first.float()
        for numbers in rest:
            total.add_(numbers)
        if divide != 1:
            total.mul_(1 / divide)
        if total is not out:
            out.copy_(total)

    def decode_add(self, payloads: Tensor, into: Tensor) -> None:
        into.add_(self._numbers(payloads, into.shape[-1]))

    def _numbers(self, payloads: Tensor, n: int) -> Tensor:
        return payloads.view(self.dtype)[..., :n]


@dataclass(frozen=True)
class Quantised:
    """Blocks of int8, fp8 or int4 codes with a bf16 scale each."""

    format: Format

    @property
    def name(self) -> str:
        rotated = f", rotated by {self.format.rotation}" if self.format.rotation else ""
        return f"{self.format.bits} in blocks of {self.format.block}{rotated}"

    @property
    def bits(self) -> int:
        return 4 if self.format.bits == "int4" else 8

    def wire_bytes(self, n: int) -> int:
        return payload_bytes(n, self.format)

    def encode(
        self, rows: Tensor, out: Tensor, *, minus: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        quantize.encode(rows, self.format, out=out, minus=minus, residual=residual)

    def decode_sum(self, payloads: Tensor, out: Tensor, divide: float = 1) -> None:
        quantize.decode_sum(payloads, out.shape[-1], self.format, out=out, divide=divide)

    def decode_add(self, payloads: Tensor, into: Tensor) -> None:
        quantize.decode_add(payloads, into.shape[-1], self.format, into)

    def non_finite(self, payloads: Tensor, n: int) -> Tensor:
        """How many blocks of payloads (m, `wire_bytes(n)`) hold NaN or infinity, a scalar."""
        codes = self.format.blocks(n) * self.format.code_bytes
        scales = payloads[:, codes : codes + 2 * self.format.blocks(n)]
        return scales.view(torch.bfloat16).isnan().sum()

    def residual(self, rows: int, n: int, storage: str, device: torch.device) -> Tensor:
        """Zeros that `encode` keeps the errors of rows (rows, n) in: "bf16", or an "int8" payload each."""
        if storage == "int8":
            size = payload_bytes(n, Format("int8", self.format.block))
            return torch.zeros(rows, size, dtype=torch.uint8, device=device)
        return torch.zeros(rows, residual_numel(n, self.format), dtype=torch.bfloat16, device=device)
