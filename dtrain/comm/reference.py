"""The copy of a unit's weights that every rank holds, for gathers that send differences only.

It is kept as bf16, 2 bytes a parameter, or as int8 payloads, about 1. Either way ranks hold the same bits,
and updates are a pure function of what was there and what was received.
"""

from typing import Literal

import torch
from torch import Tensor

from dtrain.comm.codec import Cast, Codec, Quantised
from dtrain.kernels.payload import Format

__all__ = ["Reference"]


class Reference:
    """Rows (W, n), one for each rank's shard, zero where parameters are exact.

    Args:
        keep: in which form.
        numel: n.

    Attributes:
        exact: (W, numbers) of the parameters that travel exactly, as last received.
        saved: this rank's row (1, bytes), packed, of a reference that is to be restored.
    """

    exact: Tensor

    def __init__(self, keep: Literal["bf16", "int8"], numel: int) -> None:
        self.codec: Codec = Cast(torch.bfloat16) if keep == "bf16" else Quantised(Format("int8", 128))
        self.numel = numel
        self.saved: Tensor | None = None
        self._kept: Tensor | None = None

    @property
    def by_number(self) -> bool:
        """Whether each number is kept by itself: then any mesh can take it over, bit for bit."""
        return isinstance(self.codec, Cast)

    @property
    def ready(self) -> bool:
        """Whether there is one."""
        return self._kept is not None

    @property
    def nbytes(self) -> int:
        """Memory that it takes on this rank."""
        return self._kept.nbytes if self._kept is not None else 0

    def clear(self) -> None:
        """Forget it: the next gather sends the masters."""
        self._kept = self.saved = None

    def pack(self, rows: Tensor) -> Tensor:
        """Rows (m, n) in the form in which they are kept: (m, bytes) uint8."""
        packed = rows.new_empty(len(rows), self.packed_bytes, dtype=torch.uint8)
        self.codec.encode(rows, packed)
        return packed

    @property
    def packed_bytes(self) -> int:
        """Of a row."""
        return self.codec.wire_bytes(self.numel)

    def begin(self, packed: Tensor) -> None:
        """Start from packed rows (W, bytes)."""
        self.saved = None
        self._kept = packed.view(torch.bfloat16)[:, : self.numel].contiguous() if self.by_number else packed

    def packed(self, rank: int) -> Tensor:
        """One rank's row (1, bytes), packed; this rank's where it is still to be restored."""
        if self.saved is not None:
            return self.saved
        row = self._there()[rank : rank + 1]
        return self.pack(row) if self.by_number else row

    def own(self, rank: int) -> Tensor:
        """One rank's row (1, n), as exact as it is kept."""
        if self.by_number:
            return self._there()[rank : rank + 1]
        row = torch.empty(1, self.numel, device=self._there().device)
        self.codec.decode_sum(self._there()[None, rank : rank + 1], row)
        return row

    def read(self, rows: Tensor) -> None:
        """Write it to rows (W, n)."""
        if self.by_number:
            rows.copy_(self._there())
        else:
            self.codec.decode_sum(self._there()[None], rows)

    def add(self, payloads: Tensor, codec: Codec) -> None:
        """Add what differences (W, bytes) stand for."""
        if self.by_number:
            codec.decode_add(payloads, self._there())
            return
        for rank in range(len(payloads)):  # a row at a time: all rows in fp32 would be 4 bytes a parameter
            row = self.own(rank)
            codec.decode_add(payloads[rank : rank + 1], row)
            self.codec.encode(row, self._there()[rank : rank + 1])

    def _there(self) -> Tensor:
        assert self._kept is not None, "the reference has not begun"
        return self._kept
