"""Inputs of blocks in the host's memory: copied there while blocks compute, and back one block ahead.

Both ways a copy runs on a stream of its own, beside compute: 2·N·D bytes a block each way in bf16, against
24·N·D² FLOPs forwards. At 50 GB/s and 400 TFLOP/s it hides from D = 700 on. Pinned buffers are kept from step
to step, by their size: to pin memory costs more than to fill it.

[Note: Memory under a copy]
A tensor may be freed only once its copy is through. `Tensor.record_stream` would leave that to the allocator,
which looks after events when it next runs out of blocks: when memory comes back would be a matter of timing,
and the peak with it. Here a reference is held instead, and let go in one of two ways: the event behind the
copy has passed, as seen from the host, or more than the limit is under way. Then the compute stream waits for
the oldest copy's event: what is freed after that is used again by that stream only, so behind the copy.

Backwards it is the other way round. The tensor is allocated for the compute stream, and the copy waits for
what that stream has to do up to then, also with that memory. Compute waits for the copy's event before it
reads; and where nobody ever reads, before the tensor is let go.
"""

from collections import defaultdict, deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.activations.meter import StashMeter

__all__ = ["HostStore"]


class _Copy(NamedTuple):
    """A tensor that a copy reads or writes.

    Args:
        event: behind the copy; None on a CPU, where it is through.
    """

    tensor: Tensor
    event: Any


class _Home:
    """A tensor in the host's memory; on its end it gives the buffer back."""

    def __init__(self, store: "HostStore", buffer: Tensor, like: Tensor) -> None:
        self.store, self.buffer = store, buffer
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.strides = torch.empty_like(like, device="meta").stride()  # dense, in the order that it has
        self.ahead: _Copy | None = None

    def values(self) -> Tensor:
        """The buffer, seen as the tensor."""
        return self.buffer.view(self.dtype).as_strided(self.shape, self.strides)

    def empty(self) -> Tensor:
        """A tensor of its kind on its device."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def __del__(self) -> None:
        self.store.end(self)


class HostStore:
    """Keeps tensors of a GPU in pinned memory; those of a CPU in a plain copy.

    Args:
        limit_bytes: of tensors whose copies to the host are not through; one is always allowed.
        meter: counts bytes.
    Attributes:
        allocated_bytes: of all buffers so far.
    """

    def __init__(self, limit_bytes: int, meter: StashMeter) -> None:
        self.limit_bytes, self.meter = limit_bytes, meter
        self.allocated_bytes = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._under_way: deque[_Copy] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> Any:
        tensor = tensor.detach()
        home = _Home(self, self._buffer(tensor), tensor)
        self.meter.put(tensor.nbytes, 0)
        copy = self._copy(home.values(), tensor, tensor)
        if copy.event is not None:
            self._hold(copy)
        return home

    def fetch(self, packed: Any) -> Tensor:
        self.prefetch(packed)
        copy: _Copy = packed.ahead
        packed.ahead = None
        _wait(*copy)
        return copy.tensor

    def prefetch(self, packed: Any) -> None:
        self._let_go()
        if packed.ahead is None:
            tensor = packed.empty()
            packed.ahead = self._copy(tensor, packed.values(), tensor)

    def end(self, home: Any) -> None:
        """Take a buffer back. One stream serves all copies, so the next one comes behind those of this."""
        if home.ahead is not None:
            _wait(*home.ahead)
        self._free[home.buffer.nbytes].append(home.buffer)

    def _buffer(self, tensor: Tensor) -> Tensor:
        free = self._free[tensor.nbytes]
        if free:
            return free.pop()
        self.allocated_bytes += tensor.nbytes
        return torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)

    def _copy(self, target: Tensor, source: Tensor, on_device: Tensor) -> _Copy:
        """Copy on the side stream, behind what compute has been given up to now."""
        if not on_device.is_cuda:
            target.copy_(source)
            return _Copy(on_device, None)
        stream = self._streams.get(on_device.device)
        if stream is None:
            stream = self._streams[on_device.device] = torch.cuda.Stream(on_device.device)
        stream.wait_stream(torch.cuda.current_stream(on_device.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return _Copy(on_device, stream.record_event())

    def _hold(self, copy: _Copy) -> None:
        # See [Note: Memory under a copy].
        self._under_way.append(copy)
        self._let_go()
        while len(self._under_way) > 1 and sum(c.tensor.nbytes for c in self._under_way) > self.limit_bytes:
            _wait(*self._under_way.popleft())

    def _let_go(self) -> None:
        while self._under_way and self._under_way[0].event.query():
            self._under_way.popleft()


def _wait(tensor: Tensor, event: Any) -> None:
    """Let the compute stream wait for a copy."""
    if event is not None:
        torch.cuda.current_stream(tensor.device).wait_event(event)
