"""The budget: an exact choice, from costs that are those of a real run, kept to by real runs."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dtrain.activations.budget import Budget, Budgeted
from dtrain.activations.kinds import describe, describe_module
from dtrain.activations.measure import Measured, measure
from dtrain.activations.policy import ActivationConfig
from dtrain.activations.region import Region
from dtrain.activations.selective import instance_contexts
from dtrain.blocks import find_blocks
from tests.dtrain.activation_models import (
    HEADS,
    B,
    D,
    N,
    Twice,
    U,
    assert_bits,
    filled,
    live_bytes,
    step,
    with_policy,
)
from tests.dtrain.tiny_dit import Block as DiTBlock
from uvit.layers import Block

X = 4 * B * N * D
LSE = 4 * B * N * HEADS
PRODUCT = 2 * B * N * D * D
ATTENTION = 4 * B * N * N * D


def kept_by_full(model: nn.Module, x: Tensor) -> int:
    full = with_policy(model, ActivationConfig("full"))
    return live_bytes(lambda: full(x))


def in_units(n: float) -> float:
    return n * X / 2**30


def budgeted(model: nn.Module, units: float, **others: Any) -> tuple[nn.Module, Budget]:
    changed = with_policy(model, ActivationConfig("budget", budget_gib=in_units(units), **others))
    forward: Any = find_blocks(changed)[0].forward
    return changed, forward.budget


# --- costs


def real_bytes(block: nn.Module, *args: Tensor) -> int:
    """What autograd keeps of a real call, beyond parameters and inputs and what is returned."""
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = block(*args)
    own = {x.untyped_storage()._cdata for x in (*block.parameters(), *args, out)}
    return sum(x.untyped_storage().nbytes() for place, x in found.items() if place not in own)


def real_flops(block: nn.Module, *args: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        block(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("chunks", [1, 4])
def test_costs_of_our_block_by_formula(skip: bool, chunks: int) -> None:
    block, x = Block(D, HEADS, skip=skip), torch.randn(B, N, D, requires_grad=True)
    block.mlp.chunks = chunks
    inputs = (x, x) if skip else (x,)
    found = measure(block.forward, inputs, {})
    wanted = [
        *([("skip_linear", X, 2 * PRODUCT)] if skip else []),
        ("mm", 3 * X, 3 * PRODUCT),
        ("_scaled_dot_product_flash_attention_for_cpu", X + LSE, ATTENTION),
        ("addmm", X, PRODUCT),
        *([] if chunks > 1 else [("addmm", 4 * X, 4 * PRODUCT)]),
    ]
    last = 8 if chunks > 1 else 4  # products of the operator in front of which PyTorch stops
    assert [(op.call[0].partition("::")[2], op.bytes, op.flops) for op in found.ops] == wanted
    assert found.forward_flops == (12 + 2 * skip) * PRODUCT + ATTENTION
    assert found.full_flops == found.forward_flops - last * PRODUCT
    assert found.forward_flops == real_flops(block, *inputs) + ATTENTION  # PyTorch counts none on a CPU
    assert found.everything_bytes == real_bytes(block, *inputs)


def test_costs_of_a_block_that_knows_nothing_of_us() -> None:
    """PyTorch stops to compute again before the last product, whose output no gradient needs."""
    block, x, condition = DiTBlock(D, HEADS), torch.randn(B, N, D), torch.randn(B, D)
    found = measure(block.forward, (x, condition), {})
    assert found.everything_bytes == real_bytes(block, x, condition)
    assert found.forward_flops == 12 * PRODUCT + 2 * B * D * 6 * D + ATTENTION
    # The gate's gradient needs the last product's output here.
    assert found.full_flops == found.forward_flops
    plain = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    found = measure(plain.forward, (x,), {})
    assert (found.full_flops, found.pass_bytes, found.everything_bytes) == (PRODUCT, X, 2 * X)


def test_what_is_returned_and_what_draws_is_no_option() -> None:
    """The block after it keeps what is returned; attention with dropout is computed again."""
    x = torch.randn(B, N, D, requires_grad=True)
    assert measure(lambda x: (x * 2).tanh(), (x,), {}).everything_bytes == 0
    assert measure(lambda x: (x * 2).tanh().tanh(), (x,), {}).everything_bytes == X
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads = torch.randn(B, HEADS, N, D // HEADS, requires_grad=True)
    for dropout, count in ((0.0, 1), (0.1, 0)):
        found = measure(lambda x, p=dropout: attention(x, x, x, p)[0] * 2, (heads,), {})
        assert len(found.ops) == count
        assert found.full_flops == ATTENTION


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measuring_leaves_nothing_behind(dtype: torch.dtype) -> None:
    """No fake cast in autocast's cache, no draw from a generator, no gradient, no memory."""
    block = DiTBlock(D, HEADS)
    block.mlp.append(nn.Dropout(0.5))
    x, condition = torch.randn(B, N, D), torch.randn(B, D)
    with torch.autocast("cpu", dtype):
        state = torch.get_rng_state()
        found = measure(block.forward, (x, condition), {})
        assert torch.equal(torch.get_rng_state(), state)
        out = block(x, condition)
    assert type(out) is Tensor
    assert found.everything_bytes < measure(block.forward, (x, condition), {}).everything_bytes
    assert all(p.grad is None for p in block.parameters())


def test_frozen_blocks_keep_nothing() -> None:
    block = Block(D, HEADS).requires_grad_(False)
    found = measure(block.forward, (torch.randn(B, N, D),), {})
    assert found.everything_bytes == found.full_flops == 0
    assert found.ops == ()
    assert measure(block.forward, (torch.randn(B, N, D, requires_grad=True),), {}).full_flops > 0


def test_equal_work_is_one_kind() -> None:
    a, b, c = Block(D, HEADS), Block(D, HEADS), Block(D, 2 * HEADS)
    assert describe_module(a) == describe_module(b) != describe_module(c)
    b.mlp.fc1.weight.requires_grad_(False)
    assert describe_module(a) != describe_module(b)
    x = torch.randn(2, 3)
    kinds = [x, x.t(), x.half(), x[:1], x.clone().requires_grad_(), 3, None, [x], {"x": x}]
    assert len({describe(kind) for kind in kinds}) == len(kinds)
    assert describe((x, {"x": 1})) == describe((torch.zeros(2, 3), {"x": 1}))


def test_the_call_that_is_chosen_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weights = [torch.randn(8, width, requires_grad=True) for width in (8, 8, 16)]

    def forward(x: Tensor) -> Tensor:
        return (((x @ weights[0]).tanh() @ weights[1]).tanh() @ weights[2]).tanh()

    def again(*chosen: int) -> int:
        calls = tuple(("aten::mm", index) for index in chosen)
        with FlopCounterMode(display=False) as counter:
            loss = Region(forward, partial(instance_contexts, calls, 10**6 + len(calls)))(x).sum()
            plain = counter.get_total_flops()
            loss.backward()
        return counter.get_total_flops() - 3 * plain  # two products backwards for each

    small, wide = 2 * 3 * 8 * 8, 2 * 3 * 8 * 16
    assert again(0) == again(1) == small + wide
    assert again(2) == 2 * small
    assert again(0, 2) == small
    assert not caplog.records
    for _ in range(3):
        assert again(0, 1, 7) == wide
    (said,) = [r.message for r in caplog.records]
    assert said.startswith("activations: aten::mm 7 should be kept but was not called")


# --- the whole


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    import dtrain.activations.budget as module

    found: list[Measured] = []

    def spy(*args: Any) -> Measured:
        found.append(measure(*args))
        return found[-1]

    monkeypatch.setattr(module, "measure", spy)
    return found


@pytest.mark.parametrize("units", [0.5, 2.5, 7, 20, 60, 200])
def test_real_bytes_are_those_of_the_choice(units: float) -> None:
    model, x = U(), torch.randn(B, N, D)
    full = kept_by_full(model, x)
    changed, budget = budgeted(model, units)
    changed(x)
    assert live_bytes(lambda: changed(x)) == full  # measured, but not chosen yet
    changed(x).sum().backward()
    (choice,) = budget.choices
    assert live_bytes(lambda: changed(x)) - full == choice.kept_bytes <= units * X
    # Had something been left that fits, it would have been taken; everything is 12 or 13 units a block.
    assert units * X - choice.kept_bytes < 4 * X or {o.saved for o in choice.options} == {None}


def test_real_flops_are_those_of_the_choice() -> None:
    model, x = U(), torch.randn(B, N, D)

    def backward_flops(net: nn.Module) -> int:
        loss = net(x).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    none = backward_flops(with_policy(model, ActivationConfig()))
    changed, budget = budgeted(model, 12)
    backward_flops(changed)
    (choice,) = budget.choices
    attention = sum(
        ATTENTION
        for option in choice.options
        if option.saved is not None and not any("attention" in name for name, _ in option.saved)
    )
    assert backward_flops(changed) - none == choice.recomputed_flops - attention
    assert 0 < choice.recomputed_flops < choice.forward_flops


def test_kinds_are_measured_once_and_shapes_on_their_own(measured: list[Measured]) -> None:
    model, inputs = filled("u")
    changed, budget = budgeted(model, 12)
    longer = {"x": torch.randn(B, 2 * N, D)}
    for _ in range(2):
        for each in (inputs, longer):
            assert_bits(step(changed, each), step(model, each))
    # The first block's input asks for no gradient, those with a skip are another class of work.
    assert len(measured) == 2 * 3
    assert [choice.kept_bytes <= 12 * X for choice in budget.choices] == [True, True]
    assert budget.choices[0].kept_bytes > 11 * X
    assert budget.choices[1].recomputed_flops > budget.choices[0].recomputed_flops


def test_a_block_that_runs_twice_counts_twice() -> None:
    model, x = Twice(), torch.randn(B, N, D)
    changed, budget = budgeted(model, 30)
    full = kept_by_full(model, x)
    changed(x).sum().backward()
    (choice,) = budget.choices
    assert live_bytes(lambda: changed(x)) - full == choice.kept_bytes
    assert 26 * X < choice.kept_bytes <= 30 * X


def test_passes_that_wait_together_share_the_budget() -> None:
    model, x = U(), torch.randn(B, N, D)
    changed, budget = budgeted(model, 24)
    (changed(x).sum() + changed(x).sum()).backward()
    (choice,) = budget.choices
    full = kept_by_full(model, x)
    assert choice.kept_bytes <= 24 * X
    assert live_bytes(lambda: [changed(x), changed(x)]) - 2 * full == choice.kept_bytes


def test_a_pass_without_a_backward_pass_does_not_count() -> None:
    model, inputs = filled("u")
    changed, budget = budgeted(model, 12)
    changed(**inputs)  # dropped, with its graph
    step(changed, inputs)
    once, other = budgeted(model, 12)
    step(once, inputs)
    assert budget.choices == other.choices


def test_a_shared_call_takes_what_fits_all_its_passes() -> None:
    """The same text beside a short and a long video."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(D, HEADS) for _ in range(2))

        def forward(self, text: Tensor, video: Tensor) -> Tensor:
            return self.blocks[0](text).sum() + self.blocks[1](video).sum()

    model, text = Pair(), torch.randn(B, N, D)
    changed, budget = budgeted(model, 12)
    for tokens in (N, 4 * N, N):
        changed(text, torch.randn(B, tokens, D)).backward()
    full = with_policy(model, ActivationConfig("full"))
    for tokens in (N, 4 * N):
        video = torch.randn(B, tokens, D)
        more = live_bytes(lambda: changed(text, video)) - live_bytes(lambda: full(text, video))  # noqa: B023
        assert more <= 12 * X
    assert len(budget.choices) == 2


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = filled("u")
    changed, _ = budgeted(model, 55)
    with caplog.at_level(logging.INFO, "dtrain.activations"):
        for _ in range(3):
            step(changed, inputs)
    (said,) = [r.message for r in caplog.records if "budget" in r.message]
    assert said.startswith("activations: budget 0.01 GiB: ")
    assert "4 calls keep everything" in said
    assert said.endswith("of the blocks' forward FLOPs are recomputed")


class Reads(nn.Module):
    """Looks at a value, which a fake tensor does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) if float(x.detach().sum()) else x


def test_a_block_that_cannot_be_measured_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Reads() for _ in range(2))
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    changed = copy.deepcopy(model)
    budget = Budget(2**30)
    for number, block in enumerate(changed.blocks):
        block.forward = Budgeted(block, number, budget, None, 10**6)
    x = torch.randn(4, D)
    for _ in range(2):
        changed.blocks[1](changed.blocks[0](x)).sum().backward()
    said = [r.message for r in caplog.records if "cannot be measured" in r.message]
    assert len(said) == 2  # the first block's input asks for no gradient
    assert "block 0" in said[0]
    assert "it recomputes everything" in said[0]
    assert budget.choices[0].kept_bytes == 0


def test_a_budget_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"activations.budget_gib = 0.0: policy = 'budget' needs"):
        ActivationConfig("budget")
