"""The host's memory as a stash of a GPU: no race, whoever is late, and the memory that it promises.

Where no GPU is, the same runs are rehearsed on the CPU, where nothing runs beside anything.
"""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.activations.host import HostStore
from dtrain.activations.meter import StashMeter
from dtrain.activations.policy import ActivationConfig
from dtrain.blocks import find_blocks
from tests.dtrain.activation_models import B, D, N, assert_bits, filled, step, with_policy

pytestmark = pytest.mark.gpu(rehearsal=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X = 4 * B * N * D
_PAUSE_CYCLES = 2_000_000  # about a millisecond


def pause() -> None:
    if DEVICE == "cuda":
        torch.cuda._sleep(_PAUSE_CYCLES)


def poison(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Fill what the allocator would give to the next block with NaN."""
    _ = [torch.full_like(output, torch.nan) for _ in range(8)]


def on_device(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = filled(name)
    return model.to(DEVICE), {key: value.to(DEVICE) for key, value in inputs.items()}


@pytest.fixture
def exact() -> Any:
    """Attention's gradients that do not depend on who adds first."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("late", ["nobody", "compute", "copies"])
@pytest.mark.parametrize("limit_gib", [1.0, 1e-9])
@pytest.mark.parametrize("name", ["u", "uvit", "dropped"])
def test_no_schedule_changes_a_bit(
    name: str, limit_gib: float, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = on_device(name)
    wanted = step(model, inputs)
    changed = with_policy(model, ActivationConfig("full", stash="host", stash_limit_gib=limit_gib))
    for block in find_blocks(changed):
        block.register_forward_hook(poison)
        if late == "compute":
            block.register_forward_pre_hook(lambda *_: pause())
    if late == "copies":
        copy_on_side = HostStore._copy

        def slow(self: HostStore, target: Tensor, source: Tensor, on_device: Tensor) -> Any:
            for stream in self._streams.values():
                with torch.cuda.stream(stream):
                    pause()
            return copy_on_side(self, target, source, on_device)

        monkeypatch.setattr(HostStore, "_copy", slow)
    for _ in range(3):
        assert_bits(step(changed, inputs), wanted)


def test_what_was_fetched_ahead_and_never_read_is_let_go() -> None:
    """Its memory must not be used again while the copy still writes to it."""
    store = HostStore(2**30, StashMeter())
    x = torch.randn(B, N, D, device=DEVICE)
    home = store.put(x)
    if DEVICE == "cuda":
        stream = store._streams[x.device]
        with torch.cuda.stream(stream):
            pause()
    store.prefetch(home)
    del home
    other = torch.ones_like(x)
    for _ in range(3):
        other = other + 1
    assert torch.equal(other, torch.full_like(x, 4.0))
    again = store.put(other)
    assert store.allocated_bytes == X
    assert torch.equal(store.fetch(again), other)


@pytest.mark.skipif(DEVICE == "cpu", reason="memory of a GPU")
def test_memory_of_the_device() -> None:
    """Between the passes nothing is there but what the last block returns; the buffers are pinned, once."""
    model, inputs = on_device("u")
    changed = with_policy(model, ActivationConfig("full", stash="host"))
    forward: Any = find_blocks(changed)[0].forward
    store: HostStore = forward.stash.store
    for _ in range(3):
        step(changed, inputs)
    changed.zero_grad()
    gc.collect()
    before = torch.cuda.memory_allocated()
    out = changed(**inputs)
    torch.cuda.synchronize()
    store._let_go()
    assert not store._under_way
    assert torch.cuda.memory_allocated() - before == X
    del out
    assert store.allocated_bytes == 5 * X
    assert all(buffer.is_pinned() for buffers in store._free.values() for buffer in buffers)


def test_compute_waits_where_too_much_is_under_way() -> None:
    store = HostStore(X, StashMeter())
    homes = []
    for _ in range(6):
        pause()
        homes.append(store.put(torch.randn(B, N, D, device=DEVICE)))
        assert sum(copy.tensor.nbytes for copy in store._under_way) <= X
    assert all(torch.isfinite(store.fetch(home)).all() for home in homes)
