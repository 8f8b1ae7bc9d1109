"""Exact peak of the tensor memory that one call allocates.

On the CPU the allocator's own events are replayed: every block that the call allocates counts from its
allocation to its release, workspaces inside operators included, in the bytes that were asked for:

    peak = max over events of Σ bytes of the blocks allocated since the start and not yet freed

Blocks that were there before the call count neither while they live nor when they are freed. On CUDA the
caching allocator keeps the same number (rounded up to its 512-byte blocks).
Source: c10/core/CPUAllocator.cpp, torch/profiler/_memory_profiler.py in https://github.com/pytorch/pytorch
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak bytes of tensor memory that `call` holds at once beyond what was held before it."""
    gc.collect()
    if torch.device(device).type == "cuda":
        return _cuda_peak(call)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    return _replay(_allocations(trace.profiler.kineto_results.experimental_event_tree()))


def persistent_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state; storage that several tensors share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocations(nodes: Iterable[Any]) -> list[tuple[int, int, int]]:
    """(time in ns, address, bytes) of each allocation (> 0) and release (< 0) on the CPU, in time order.

    Without what a collective allocates for itself: gloo sums in copies that its own threads free unseen.
    """

    def walk(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
        for node in nodes:
            if node.name.startswith("c10d::"):
                continue
            if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
                yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
            yield from walk(node.children)

    return sorted(walk(nodes), key=lambda event: event[0])


def _replay(events: Iterable[tuple[int, int, int]]) -> int:
    # The process-wide total that the profiler reports is not used: it forgets what is freed between two
    # profiles, so it drifts. Own blocks are matched by address instead.
    live: dict[int, int] = {}
    held = peak = 0
    for _, address, size in events:
        if size > 0:
            # Threads that do not profile free unseen, until the address comes again.
            held += size - live.get(address, 0)
            live[address] = size
            peak = max(peak, held)
        else:
            held -= live.pop(address, 0)
    return peak
