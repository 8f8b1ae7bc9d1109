"""How fast links and codecs are, timed by all ranks at once.

A host or a link that ranks share is then shared as in training. Every rank gets the same figures: those of
the slowest.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.codec import Cast, Codec, Quantised
from dtrain.comm.collectives import all_gather, all_to_all, reduce_scatter
from dtrain.comm.config import Scheme, Storage

__all__ = ["CodecClock", "Link", "measure_exchange", "measure_link"]

_NUMBERS = 2**20  # of a codec's measurement
_REPEATS = 3
_ENOUGH_S = 0.05
_LARGEST = 2**27  # bytes of all ranks' messages: this much memory is there before a training begins


class Link(NamedTuple):
    """Links among a group, as collectives use them: seconds for each byte that a rank sends.

    Args:
        latency: seconds of a collective of next to nothing.
        gather: of an all-gather.
        scatter: of the backend's reduce-scatter.
        exchange: of an all-to-all.
    """

    latency: float
    gather: float
    scatter: float
    exchange: float

    @property
    def rate(self) -> float:
        """Bytes that a rank sends in a second, in an all-gather."""
        return 1 / self.gather


def measure_link(group: dist.ProcessGroup, device: torch.device) -> Link:
    """Time the collectives of a group, which every rank of it does at once."""
    collectives = (_gather, _scatter, _exchange)
    return Link(_latency(group, device), *(_seconds_a_byte(c, group, device) for c in collectives))


def measure_exchange(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds of an all-to-all for each byte that a rank sends."""
    return _seconds_a_byte(_exchange, group, device)


def _latency(group: dist.ProcessGroup, device: torch.device) -> float:
    return _agreed(_gather(16, group, device), group, device)


def _seconds_a_byte(
    collective: Callable[[int, dist.ProcessGroup, torch.device], Callable[[], None]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> float:
    """Of what a rank sends; messages grow until a collective takes long enough to be timed."""
    size = 2**16
    while True:
        seconds = _agreed(collective(size, group, device), group, device)
        if seconds > _ENOUGH_S or group.size() * size >= _LARGEST:
            return seconds / ((group.size() - 1) * size)
        size *= 4


def _gather(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    mine, everybody = _buffers(size, group, device)
    return lambda: all_gather(everybody, mine, group)


def _scatter(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    mine, everybody = (buffer.view(torch.bfloat16) for buffer in _buffers(size, group, device))
    return lambda: reduce_scatter(mine, everybody, group)


def _exchange(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    _, everybody = _buffers(size, group, device)
    received = torch.empty_like(everybody)
    return lambda: all_to_all(received, everybody, group)


def _buffers(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """A message, and one for each rank."""
    mine = torch.zeros(size, dtype=torch.uint8, device=device)
    return mine, mine.repeat(group.size())


def _agreed(call: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds of a call, the median of some; of all ranks of all groups the longest."""
    call()
    seconds = torch.tensor(statistics.median(_timed(call, group, device) for _ in range(_REPEATS)))
    longest = seconds.to(device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def _timed(call: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    dist.barrier(group)
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CodecClock:
    """Seconds that codecs take for a number on this device, with all ranks at work."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        ranks = group.size()
        self.rows = torch.randn(ranks, _NUMBERS // ranks, device=device).bfloat16()
        self.weights = torch.empty_like(self.rows)

    def gathers(self, scheme: Scheme) -> float:
        """Of the gathers of a step: a shard is encoded, all shards are decoded, for both passes."""
        codec, row = scheme.weights, self.rows[:1].float()
        if isinstance(codec, Cast):
            return 0.0  # FSDP2 casts in any case
        payloads = self._payloads(codec, self.rows)

        def both() -> None:
            codec.encode(row, payloads[:1])
            codec.decode_sum(payloads[None], self.weights)

        def delta() -> None:
            codec.encode(row, payloads[:1], minus=self.rows[:1])
            codec.decode_add(payloads, self.weights)

        copy = 2 * self._seconds(lambda: self.weights.copy_(self.rows))
        return self._seconds(delta) + copy if scheme.delta else 2 * self._seconds(both)

    def sums(self, codec: Codec, feedback: Storage) -> float:
        """Of a sum: all rows are encoded, one row is decoded from each rank."""
        payloads = self._payloads(codec, self.rows)
        residual = None
        if isinstance(codec, Quantised) and feedback != "none":
            residual = codec.residual(len(self.rows), self.rows.shape[1], feedback, self.device)
        out = torch.empty(1, self.rows.shape[1], device=self.device)

        def run() -> None:
            codec.encode(self.rows, payloads, residual=residual)
            codec.decode_sum(payloads[:, None], out)

        return self._seconds(run)

    def _payloads(self, codec: Codec, rows: Tensor) -> Tensor:
        size = codec.wire_bytes(rows.shape[1])
        payloads = torch.empty(len(rows), size, dtype=torch.uint8, device=self.device)
        codec.encode(rows, payloads)
        return payloads

    def _seconds(self, call: Callable[[], object]) -> float:
        def run() -> None:
            call()

        return _agreed(run, self.group, self.device) / self.rows.numel()
