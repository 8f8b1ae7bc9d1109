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

    Attributes:
        exact: (W, numbers) of the parameters that travel exactly, as last received.
        row: this rank's row of a reference that is to be restored, fp32 or bf16 (n,).
    """

    exact: Tensor

    def __init__(self, keep: Literal["bf16", "int8"]) -> None:
        self.codec: Codec = Cast(torch.bfloat16) if keep == "bf16" else Quantised(Format("int8", 128))
        self.row: Tensor | None = None
        self._kept: Tensor | None = None
        self._numel = 0

    @property
    def ready(self) -> bool:
        """Whether there is one."""
        return self._kept is not None

    @property
    def stored_dtype(self) -> torch.dtype:
        """In which a checkpoint holds it without loss."""
        return torch.bfloat16 if isinstance(self.codec, Cast) else torch.float32

    @property
    def nbytes(self) -> int:
        """Memory that it takes on this rank."""
        return self._kept.nbytes if self._kept is not None else 0

    def clear(self) -> None:
        """Forget it."""
        self._kept = self.row = None

    def pack(self, rows: Tensor) -> Tensor:
        """Rows (m, n) in the form in which they are kept: (m, bytes) uint8."""
        kept = rows.new_empty(len(rows), self.codec.wire_bytes(rows.shape[1]), dtype=torch.uint8)
        self.codec.encode(rows, kept)
        return kept

    def begin(self, kept: Tensor, numel: int) -> None:
        """Start from packed rows (W, bytes) of `numel` numbers each."""
        self._numel, self.row = numel, None
        if isinstance(self.codec, Cast):
            kept = kept.view(torch.bfloat16)[:, :numel].contiguous()
        self._kept = kept

    def own(self, rank: int) -> Tensor:
        """One rank's row (n,), as exact as it is kept; this rank's where it is still to be restored."""
        if self.row is not None:
            return self.row
        if isinstance(self.codec, Cast):
            return self._there()[rank]
        row = torch.empty(1, self._numel, device=self._there().device)
        self.codec.decode_sum(self._there()[None, rank : rank + 1], row)
        return row[0]

    def read(self, rows: Tensor) -> None:
        """Write it to rows (W, n)."""
        if isinstance(self.codec, Cast):
            rows.copy_(self._there())
        else:
            self.codec.decode_sum(self._there()[None], rows)

    def add(self, payloads: Tensor, codec: Codec) -> None:
        """Add what differences (W, bytes) stand for."""
        if isinstance(self.codec, Cast):
            codec.decode_add(payloads, self._there())
            return
        for rank in range(len(payloads)):  # a row at a time: all rows in fp32 would be 4 bytes a parameter
            row = self.own(rank)[None]
            codec.decode_add(payloads[rank : rank + 1], row)
            self.codec.encode(row, self._there()[rank : rank + 1])

    def _there(self) -> Tensor:
        assert self._kept is not None, "the reference has not begun"
        return self._kept
