"""Messages: what one rank sends another of a unit of parameters, in one piece.

FSDP2 moves a unit as rows (m, n), all parameters of the unit one behind another. A message is

    [ payload of the whole row, small parameters as zeros | small parameters as they are | zeros to 16 bytes ]

Small or named parameters (norms, biases) stay in full precision and must not set the scale of a block that a
matrix shares with them. Written twice, they cost less than a kernel launch each would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.comm.codec import Codec, Quantised, aligned

__all__ = ["Packing", "Segment"]


class Segment(NamedTuple):
    """One parameter's share of a row."""

    numel: int
    exact: bool


class Packing:
    """How rows of a unit become messages.

    Args:
        segments: the parameters of a row, in order.
        codec: of the payload.
        exact_dtype: in which exact parameters travel.
    """

    def __init__(self, segments: Sequence[Segment], codec: Codec, exact_dtype: torch.dtype) -> None:
        self.codec = codec
        self.exact_dtype = exact_dtype
        self.numel = sum(s.numel for s in segments)
        self.exact_ranges = _exact_ranges(segments)
        self.exact_numel = sum(stop - start for start, stop in self.exact_ranges)
        # A payload of zeros would be waste.
        self.all_exact = self.exact_numel == self.numel
        self.payload_bytes = 0 if self.all_exact else codec.wire_bytes(self.numel)
        self.message_bytes = self.payload_bytes + aligned(self.exact_numel * exact_dtype.itemsize)

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Room for messages, (rows, message bytes) uint8."""
        return torch.empty(rows, self.message_bytes, dtype=torch.uint8, device=device)

    def payload(self, messages: Tensor) -> Tensor:
        """The payloads of messages (..., message bytes)."""
        return messages[..., : self.payload_bytes]

    def exact(self, messages: Tensor) -> Tensor:
        """The exact numbers of messages (..., message bytes), all of a row one behind another."""
        size = self.exact_numel * self.exact_dtype.itemsize
        return messages.narrow(-1, self.payload_bytes, size).view(self.exact_dtype)

    def pack(
        self, rows: Tensor, out: Tensor, *, minus: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        """Write the messages of rows (m, n), in which exact parameters are zero afterwards.

        Args:
            rows: fp32 or bf16.
            out: (m, message bytes).
            minus: (m, n), zero where parameters are exact; taken off what the codec carries.
            residual: see `Codec.encode`.
        """
        self._tail(out).zero_()
        self.copy(self.of_rows(rows), self.parts(self.exact(out)))
        for part in self.of_rows(rows):
            part.zero_()
        if self.payload_bytes:
            self.codec.encode(rows, self.payload(out), minus=minus, residual=residual)

    def non_finite(self, messages: Tensor) -> Tensor | None:
        """How many blocks of messages (m, message bytes) are not finite; None for casts.

        Scales tell of blocks at 1/64 of the payload. Of a cast it would be a pass over all numbers, and what
        is not finite travels as it is.
        """
        if self.all_exact or not isinstance(self.codec, Quantised):
            return None
        return self.codec.non_finite(self.payload(messages), self.numel)

    def unpack(self, messages: Tensor, out: Tensor) -> None:
        """Write the rows (m, n) that messages (m, message bytes) stand for."""
        self.unpack_sum(messages[None], out)

    def unpack_sum(self, messages: Tensor, out: Tensor, divide: float = 1) -> None:
        """Write sums over k of messages (k, m, bytes), in fp32 and in order, / divide, to (m, n)."""
        if self.payload_bytes:
            self.codec.decode_sum(self.payload(messages), out, divide)
        if self.exact_numel:
            self.copy(self.parts(self.exact_sum(messages, divide)), self.of_rows(out))

    def exact_sum(self, messages: Tensor, divide: float = 1) -> Tensor:
        """(m, exact numbers) fp32."""
        first, *rest = self.exact(messages).unbind()
        total = first.to(torch.float32, copy=True)
        for numbers in rest:
            total.add_(numbers)
        return total.mul_(1 / divide) if divide != 1 else total

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        """Views of the exact parameters in rows (m, n)."""
        return [rows[:, start:stop] for start, stop in self.exact_ranges]

    def parts(self, exact: Tensor) -> list[Tensor]:
        """The exact parameters, each (m, its numbers), of (m, exact numbers)."""
        return list(exact.split([stop - start for start, stop in self.exact_ranges], dim=-1))

    @staticmethod
    def copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy each source to its target."""
        if sources:
            torch._foreach_copy_(list(targets), list(sources))

    def _tail(self, messages: Tensor) -> Tensor:
        return messages[..., self.payload_bytes + self.exact_numel * self.exact_dtype.itemsize :]


def _exact_ranges(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """(start, stop) of runs of exact parameters."""
    ranges: list[tuple[int, int]] = []
    stop = 0
    for numel, exact in segments:
        start, stop = stop, stop + numel
        if exact and ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        elif exact and numel:
            ranges.append((start, stop))
    return ranges
