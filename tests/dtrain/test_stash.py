"""Stashed block inputs: put away once, given back as they were or as the format rounds them, and let go."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dtrain.activations.host import HostStore
from dtrain.activations.meter import StashMeter
from dtrain.activations.policy import ActivationConfig, stash_meter
from dtrain.activations.stash import QuantisedStore, Stash
from dtrain.blocks import find_blocks
from dtrain.kernels.payload import Format, payload_bytes
from dtrain.kernels.quantize import decode, encode
from tests.dtrain.activation_models import B, D, N, assert_bits, filled, step, with_policy

X = 4 * B * N * D


class Recording:
    """A store that keeps the tensors themselves and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.puts = 0

    def put(self, tensor: Tensor) -> Any:
        self.puts += 1
        self.asked.append(("put", self.puts))
        return _Numbered(self.puts, tensor.clone())

    def fetch(self, packed: Any) -> Tensor:
        self.asked.append(("fetch", packed.number))
        return packed.tensor.clone()

    def prefetch(self, packed: Any) -> None:
        self.asked.append(("prefetch", packed.number))


class _Numbered:
    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.tensor = number, tensor


def recorded(first: int = 0, smallest: int = 1) -> tuple[Stash, Recording]:
    store = Recording()
    return Stash(store, StashMeter(), first, smallest), store


def regions(stash: Stash, x: Tensor, *functions: Any) -> Tensor:
    for number, function in enumerate(functions):
        with stash.inputs(number, (x,)):
            x = checkpoint(function, x, use_reentrant=False)
    return x


def square(x: Tensor) -> Tensor:
    return x * x


def test_nothing_keeps_the_plain_tensor() -> None:
    stash, store = recorded()
    x = torch.randn(256, 256, requires_grad=True)
    middle: list[StorageWeakRef] = []

    def watched(x: Tensor) -> Tensor:
        if not middle:
            middle.append(StorageWeakRef(x.untyped_storage()))
        return x * x

    out = regions(stash, x, square, watched)
    assert store.puts == 2
    assert middle[0].expired()
    out.sum().backward()
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3)


def test_what_two_blocks_take_is_put_away_once() -> None:
    model, inputs = filled("u")
    changed = with_policy(model, ActivationConfig("full", stash="host"))
    meter = stash_meter(changed)
    assert meter is not None
    assert_bits(step(changed, inputs), step(model, inputs))
    assert meter.read() == {"stash_mib": 5 * X / 2**20, "stash_kept_mib": 0.0}  # 7 inputs, 2 of them twice


def test_a_view_or_another_version_is_another_tensor() -> None:
    stash, store = recorded()
    x = torch.randn(512, 256).requires_grad_() * 1
    kept = []
    for number, value in enumerate((x, x, x[:256], x.t(), x.view(512, 256))):
        with stash.inputs(number, (value,)):
            kept.append(checkpoint(square, value, use_reentrant=False))
    assert store.puts == 3
    x.detach().add_(1)  # changes the version of all
    with stash.inputs(9, (x,)):
        kept.append(checkpoint(square, x, use_reentrant=False))
    assert store.puts == 4


def test_a_new_storage_is_never_taken_for_a_freed_one() -> None:
    """Its record in memory may lie where the other's was."""
    stash, store = recorded()
    sums = []
    for number in range(16):
        x = torch.tensor(float(number), requires_grad=True).expand(256, 256) * 1
        with stash.inputs(number, (x,)):
            sums.append(checkpoint(square, x, use_reentrant=False).sum())
        del x
    assert store.puts == 16
    for value in sums:
        value.backward()
    assert [number for what, number in store.asked if what == "fetch"] == list(range(1, 17))


def test_memory_of_forgotten_tensors_is_not_remembered() -> None:
    stash, _ = recorded()
    for number in range(5):
        regions(stash, torch.randn(256, 256, requires_grad=True), square, square).sum().backward()
        assert len(stash._shared) <= 2, number
        assert not [call for call in stash._calls.values() if call.packed]


def test_the_call_before_comes_ahead() -> None:
    stash, store = recorded()
    x = torch.randn(256, 256, requires_grad=True)
    out = regions(stash, x, square, square, square)
    store.asked.clear()
    out.sum().backward()
    assert store.asked == [
        ("prefetch", 3), ("fetch", 3), ("prefetch", 2),
        ("prefetch", 2), ("fetch", 2), ("prefetch", 1),
        ("prefetch", 1), ("fetch", 1),
    ]  # fmt: skip


def test_a_retained_graph_fetches_again() -> None:
    for config in (ActivationConfig("full", stash="host"), ActivationConfig("full", stash="int8")):
        model, inputs = filled("u")
        changed = with_policy(model, config)
        loss = changed(**inputs).square().mean()
        loss.backward(retain_graph=True)
        first = {n: p.grad.clone() for n, p in changed.named_parameters() if p.grad is not None}
        changed.zero_grad()
        loss.backward()
        for name, parameter in changed.named_parameters():
            assert torch.equal(parameter.grad, first[name]), name


@pytest.mark.parametrize("small", [torch.randn(255, 257), torch.randn(2**16), torch.ones(256, 256).long()])
def test_what_is_small_or_no_matrix_of_floats_stays(small: Tensor) -> None:
    stash, store = recorded(smallest=2**16)
    with stash.inputs(0, (small,)):
        checkpoint(lambda x, y: x * y, small, torch.ones((), requires_grad=True), use_reentrant=False)
    assert store.puts == 0


def test_later_blocks_share_what_the_first_have_put_away() -> None:
    stash, store = recorded(first=1)
    x, y = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    outs = []
    for block, value in ((0, x), (1, x), (1, y)):
        with stash.inputs(block, (value,)):
            outs.append(checkpoint(square, value, use_reentrant=False))
    assert store.puts == 1
    sum(out.sum() for out in outs).backward()  # type: ignore[union-attr]
    assert [number for what, number in store.asked if what == "fetch"] == [1, 1]


# --- quantised


@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_is_what_the_format_says(bits: Any, dtype: torch.dtype) -> None:
    meter = StashMeter()
    store, x = QuantisedStore(Format(bits), meter), torch.randn(3, 77, 301, dtype=dtype).transpose(0, 1)
    found = store.fetch(store.put(x))
    payload = encode(x.reshape(-1), Format(bits))
    assert torch.equal(found, decode(payload, x.numel(), Format(bits), dtype=dtype).view(x.shape))
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert meter.read(steps=2) == {
        "stash_mib": x.nbytes / 2 / 2**20,
        "stash_kept_mib": payload_bytes(x.numel(), Format(bits)) / 2 / 2**20,
    }


def test_the_error_is_metered_where_asked() -> None:
    meter = StashMeter()
    store, x = QuantisedStore(Format("int8"), meter), torch.randn(256, 256)
    store.put(x)
    assert "stash_error" not in meter.read()
    meter.sample = True
    y = store.fetch(store.put(x))
    store.put(torch.zeros(256, 256))
    assert meter.read()["stash_error"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert 0.002 < float((x - y).norm() / x.norm()) < 0.01
    assert "stash_error" not in meter.read()


@pytest.mark.parametrize(("bits", "bound"), [("int8", 0.02), ("fp8", 0.06)])
@pytest.mark.parametrize("name", ["uvit", "tiny_dit"])
def test_the_forward_pass_is_exact_and_gradients_are_near(name: str, bits: Any, bound: float) -> None:
    model, inputs = filled(name)
    wanted, found = (
        step(model, inputs),
        step(with_policy(model, ActivationConfig("full", stash=bits)), inputs),
    )
    assert torch.equal(found.loss, wanted.loss)
    flat = [torch.cat([grad.flatten() for grad in grads.values()]) for grads in (found.grads, wanted.grads)]
    error = float((flat[0] - flat[1]).norm() / flat[1].norm())
    assert 0 < error < bound


# --- host


def test_buffers_are_used_again() -> None:
    model, inputs = filled("u")
    changed = with_policy(model, ActivationConfig("full", stash="host"))
    forward: Any = find_blocks(changed)[0].forward
    store: HostStore = forward.stash.store
    for _ in range(4):
        step(changed, inputs)
        gc.collect()
        assert store.allocated_bytes == 5 * X
    longer = {"x": torch.randn(B, 2 * N, D)}
    for _ in range(2):
        step(changed, longer)
        gc.collect()
        assert store.allocated_bytes == 5 * X + 10 * X


def test_the_host_keeps_values_and_strides() -> None:
    meter = StashMeter()
    store = HostStore(2**20, meter)
    for x in (torch.randn(300, 257), torch.randn(257, 300).t(), torch.randn(4, 4).expand(3, 4, 4)):
        home = store.put(x)
        for _ in range(2):
            found = store.fetch(home)
            assert torch.equal(found, x)
            assert found.stride() == torch.empty_like(x).stride()
    odd = torch.randn(3, 5, dtype=torch.float16)
    assert torch.equal(store.fetch(store.put(odd)), odd)


def test_small_inputs_stay_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    for smallest, puts in ((32, 2), (33, 0)):
        stash, store = recorded(smallest=smallest)
        regions(stash, x, torch.sin, torch.cos).sum().backward()
        assert store.puts == puts
    assert [r.getMessage().count("(4, 8) stay on the device") for r in caplog.records] == [1]


def test_config() -> None:
    with pytest.raises(ValueError, match=r"activations.stash = 'int8': policy = 'none' keeps.*'full'"):
        ActivationConfig(stash="int8")
    with pytest.raises(ValueError, match=r"stash_blocks = -1"):
        ActivationConfig("full", stash_blocks=-1)
    with pytest.raises(ValueError, match=r"stash_smallest = 0"):
        ActivationConfig("full", stash="int8", stash_smallest=0)
    with pytest.raises(ValueError, match=r"stash_limit_gib = 0"):
        ActivationConfig("full", stash="host", stash_limit_gib=0)
    model, _ = filled("tiny_dit")
    with pytest.raises(ValueError, match=r"stash_blocks = 4: the model has 3 blocks"):
        with_policy(model, ActivationConfig("full", stash="host", stash_blocks=4))
    assert stash_meter(with_policy(model, ActivationConfig("full"))) is None
