"""Activation policies change what is kept and computed again, by formulas, and no bit of a gradient."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.baselines.plain_uvit import PlainUViT
from benchmarks.memory import peak_bytes
from dtrain.activations.policy import ActivationConfig, apply_activation_policy, stash_meter
from dtrain.activations.selective import GROUPS, draws
from dtrain.blocks import find_blocks
from dtrain.kernels.payload import Format, payload_bytes
from dtrain.parallelize import CompileConfig, compile_blocks
from tests.dtrain.activation_models import (
    HEADS,
    B,
    D,
    N,
    U,
    assert_bits,
    filled,
    live_bytes,
    step,
    with_policy,
)

X = 4 * B * N * D  # bytes of a block's input

POLICIES = {
    "full": ActivationConfig("full"),
    "attention": ActivationConfig("selective"),
    "products": ActivationConfig("selective", save=("attention", "aten::*mm", "dtrain::gelu_linear")),
    "budget": ActivationConfig("budget", budget_gib=12 * X / 2**30),
    "host": ActivationConfig("full", stash="host"),
    "host, selective": ActivationConfig("selective", stash="host", stash_blocks=2),
    "host, budget": ActivationConfig("budget", budget_gib=12 * X / 2**30, stash="host"),
}


@pytest.mark.parametrize("name", ["uvit", "tiny_dit", "frozen_dit", "dropped", "twice"])
def test_every_policy_gives_the_bits_of_none(name: str) -> None:
    model, inputs = filled(name)
    wanted = step(model, inputs)
    for policy, config in POLICIES.items():
        changed = with_policy(model, config)
        for _ in range(2):  # a budget is at work in the second
            assert_bits(step(changed, inputs), wanted)
        if config.stash == "host":
            meter = stash_meter(changed)
            assert meter is not None
            assert meter.read()["stash_mib"] > 0, policy


def test_accumulated_and_without_gradients() -> None:
    model, inputs = filled("uvit")
    wanted = step(model, inputs, micro_batches=2)
    for policy in ("attention", "host", "host, budget"):
        changed = with_policy(model, POLICIES[policy])
        for _ in range(2):
            with torch.no_grad():
                value = changed(**inputs).square().mean()
            assert_bits(step(changed, inputs, micro_batches=2), wanted)
            assert torch.equal(2 * value, wanted.loss), policy


@pytest.mark.parametrize("name", ["twice", "tiny_dit"])
def test_under_autocast(name: str) -> None:
    """Autocast keeps casts of weights, so that a block's second call has fewer operators than its first."""
    model, inputs = filled(name)
    wanted = step(model, inputs, autocast=True)
    for policy in ("full", "products", "budget", "host, selective"):
        changed = with_policy(model, POLICIES[policy])
        for _ in range(2):
            found = step(changed, inputs, autocast=True)
            if name == "twice":  # with a cast for each use, gradients of both are added in fp32, not in bf16
                torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-4)
            else:
                assert_bits(found, wanted)


# --- what is computed again, by formula


def _sdpa(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: object, **__: object) -> int:
    return int(sdpa_flop_count(q, k, v))


def backward_flops(model: nn.Module, x: Tensor) -> int:
    # PyTorch has no formula for its attention on CPUs; that of the backward pass stays uncounted.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}
    )
    loss = model(x).sum()
    with counter:
        loss.backward()
    return counter.get_total_flops()


def test_flops_computed_again() -> None:
    model, x = U(), torch.randn(B, N, D)
    none = backward_flops(with_policy(model, ActivationConfig()), x)
    again = {
        name: backward_flops(with_policy(model, config), x) - none
        for name, config in POLICIES.items()
        if config.policy != "budget"
    }
    # qkv, proj, the MLP's first product, in front of whose second PyTorch stops; long skips
    products = 5 * 16 * B * N * D * D + 2 * 4 * B * N * D * D
    attention = 5 * 4 * B * N * N * D
    assert again["full"] == again["host"] == products + attention
    assert again["attention"] == again["host, selective"] == products
    assert again["products"] == 2 * 4 * B * N * D * D


# --- what is kept, by formula


def kept(config: ActivationConfig) -> int:
    model, x = with_policy(U(), config), torch.randn(B, N, D)
    model(x).sum().backward()  # the pool of the host's memory is there from now on
    return live_bytes(lambda: model(x))


def test_bytes_kept() -> None:
    lse = 4 * B * N * HEADS
    inputs = 5 * X  # those of all blocks but the first, and what the last returns
    assert kept(ActivationConfig("full")) == inputs
    assert kept(ActivationConfig("selective")) == inputs + 5 * (X + lse)
    assert kept(ActivationConfig("full", stash="host")) == X  # what the last returns
    for bits in ("int8", "fp8"):
        payload = payload_bytes(B * N * D, Format(bits))
        assert kept(ActivationConfig("full", stash=bits)) == X + 5 * payload
        # The first two put their inputs away; those of the others stay, but for what is a skip as well.
        assert kept(ActivationConfig("full", stash=bits, stash_blocks=2)) == X + 3 * X + 2 * payload


def test_what_bf16_keeps_takes_two_bytes_an_element(single_process_group: None) -> None:
    from dtrain.parallelize import ParallelConfig, parallelize
    from dtrain.sharding.mesh import MeshConfig, build_mesh
    from dtrain.sharding.shard import ShardConfig

    config = ParallelConfig(activations=ActivationConfig("full"), shard=ShardConfig(param_dtype="bfloat16"))
    model = parallelize(U(), build_mesh(MeshConfig(), 1, "cpu"), config)
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(B, N, D))
    assert list(seen.values()) == [X // 2] * 5


def test_a_long_skip_costs_nothing_unless_it_is_concatenated() -> None:
    """Peak of full checkpointing: 3/2·depth + c with cat, depth + c without, in units of B·N·D elements.

    cat's gradient is one tensor of two halves, and that of the skip keeps the other one alive.
    """

    def peak(model: nn.Module) -> float:
        apply_activation_policy(find_blocks(model), ActivationConfig("full"))
        x, t = torch.randn(B, 3, 16, 16), torch.rand(B) * 1000
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return peak_bytes(lambda: model(x, t).sum().backward()) / (4 * B * 257 * D)

    def split(depth: int) -> nn.Module:
        import uvit

        return uvit.build(
            "video_s2", input_size=(1, 16, 16), in_channels=3, patch_size=(1, 1, 1), width=D, heads=2,
            depth=depth, condition="none",
        )  # fmt: skip

    cat = [peak(PlainUViT(16, 1, 3, D, depth, 2)) for depth in (4, 8)]
    ours = [peak(split(depth)) for depth in (4, 8)]
    assert (cat[1] - cat[0]) / 4 == pytest.approx(1.5, rel=0.02)
    assert (ours[1] - ours[0]) / 4 == pytest.approx(1.0, rel=0.02)


# --- selective


def test_groups_name_operators_that_exist() -> None:

    known = set(torch._C._dispatch_get_all_op_names())
    assert {name for names in GROUPS.values() for name in names} <= known
    attention = {name for name in known if "attention" in name and name.endswith(("_attention", "_forward"))}
    composite = {"aten::scaled_dot_product_attention", "aten::_triton_scaled_dot_attention"}
    inference = {"aten::_native_multi_head_attention", "aten::_triton_multi_head_attention"}
    assert attention - composite - inference == set(GROUPS["attention"]) - {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    }


def test_names_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"activations.save: 'atention' is no group.*mean 'attention'.*aten::"
    ):
        ActivationConfig("selective", save=("atention",))
    with pytest.raises(ValueError, match=r"activations.save = \[\]"):
        ActivationConfig("selective", save=())


def test_a_name_that_matches_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = filled("tiny_dit")
    changed = with_policy(model, ActivationConfig("selective", save=("attention", "aten::sine*")))
    for _ in range(2):
        step(changed, inputs)
    assert [r.message for r in caplog.records if "activations" in r.message] == [
        "activations.save: 'aten::sine*' matched no operator of the blocks."
    ]


def test_what_draws_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Kept dropout would not draw in the recomputation, and the one behind it would draw its numbers."""
    model, inputs = filled("dropped")
    wanted = step(model, inputs)
    changed = with_policy(model, ActivationConfig("selective", save=("aten::*dropout*", "aten::bernoulli*")))
    assert_bits(step(changed, inputs), wanted)
    said = {r.message for r in caplog.records if "draws random numbers" in r.message}
    assert len(said) == 1
    assert "it is computed again" in said.pop()


def test_attention_draws_where_it_has_dropout() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert draws(flash, (None, None, None, 0.1), {})
    assert draws(flash, (None, None, None), {"dropout_p": 0.1})
    assert not draws(flash, (None, None, None), {})
    assert draws(torch.ops.aten.bernoulli.default, (None,), {})
    assert not draws(torch.ops.aten.mm.default, (None, None), {})


# --- compile


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return backend


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Of what autograd keeps, parameters and the model's inputs aside."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *inputs.values())}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**inputs)
    return sum(x.untyped_storage().nbytes() for place, x in found.items() if place not in own)


def compiled(model: nn.Module, config: ActivationConfig) -> nn.Module:
    changed = with_policy(model, config)
    compile_blocks(find_blocks(changed), CompileConfig(enabled=True))
    return changed


def test_compiled_regions_recompute_within_the_graph(counter: CompileCounterWithBackend) -> None:
    model, inputs = filled("u")
    wanted = step(model, inputs)
    for config, kept_bytes in {
        # Without contexts the graph keeps the state of the generator.
        ActivationConfig("full"): 4 * X + 5 * torch.get_rng_state().nbytes,
        ActivationConfig("selective"): 4 * X + 5 * (X + 4 * B * N * HEADS),
    }.items():
        counter.frame_count = 0
        torch._dynamo.reset()
        changed = compiled(model, config)
        found = step(changed, inputs)
        assert counter.frame_count == 3  # the first block, blocks, and those with a skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert saved_bytes(changed, inputs) == kept_bytes


def test_a_stash_and_a_budget_stay_outside_of_the_graph(counter: CompileCounterWithBackend) -> None:
    model, inputs = filled("u")
    wanted = step(model, inputs)
    changed = compiled(model, ActivationConfig("selective", stash="host"))
    torch.testing.assert_close(step(changed, inputs), wanted, rtol=1e-4, atol=1e-6)
    meter = stash_meter(changed)
    assert meter is not None
    assert meter.read()["stash_mib"] * 2**20 == 5 * X
    assert counter.frame_count == 3

    changed = compiled(model, ActivationConfig("budget", budget_gib=6 * X / 2**30))
    before = saved_bytes(changed, inputs)
    for _ in range(2):
        torch.testing.assert_close(step(changed, inputs), wanted, rtol=1e-4, atol=1e-6)
    assert before < saved_bytes(changed, inputs) <= before + 6 * X


@pytest.mark.usefixtures("counter")
def test_compiled_dropout_is_that_of_the_forward_pass() -> None:
    model, inputs = filled("dropped")
    wanted = step(model, inputs)
    for policy in ("full", "attention", "host"):
        torch._dynamo.reset()
        found = step(compiled(model, POLICIES[policy]), inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_compiled_by_the_eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, inputs = filled("twice")
    wanted = step(model, inputs)
    for config in (POLICIES["attention"], POLICIES["host, budget"]):
        changed = compiled(model, config)
        for _ in range(2):
            torch.testing.assert_close(step(changed, inputs), wanted, rtol=1e-4, atol=1e-6)


def test_attention_that_no_operator_serves_is_computed_again() -> None:
    """Written out by a model's own code it is no operator that could be kept."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.softmax(x @ x.mT, -1) @ self.inner(x)

    model = nn.Sequential(Written(), Written())
    x = torch.randn(B, N, D)
    for config in (ActivationConfig("full"), ActivationConfig("selective")):
        changed = with_policy_of(model, config)
        assert live_bytes(lambda changed=changed: changed(x)) == 2 * X


def with_policy_of(model: nn.Sequential, config: ActivationConfig) -> nn.Module:
    model = copy.deepcopy(model)
    apply_activation_policy(list(model), config)
    return model
