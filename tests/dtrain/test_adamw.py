"""The optimizer of sharded parameters: PyTorch's bits on the CPU, its state on disk and on any mesh."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dtrain.checkpoint import TrainingState
from dtrain.dryrun import state_bytes
from dtrain.optim import EMA, AdamW, EMAConfig, Moments, OptimConfig, build_optimizer, has_codes
from tests.checkpoints import write_state
from tests.launch import ROOT, run_python, torchrun

WORKER = ROOT / "tests" / "dtrain" / "adamw_worker.py"


def network(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 64), nn.LayerNorm(64))


def set_gradients(model: nn.Module, seed: int, absent: int | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, parameter in enumerate(model.parameters()):
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if i == absent else grad.to(parameter.dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:2], "weight_decay": 0.0}, {"params": parameters[2:]}]


def test_fp32_on_the_cpu_has_the_bits_of_pytorchs() -> None:
    """50 steps with groups, warm-up, and gradients that are not always there."""
    ours, theirs = network(), network()
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = AdamW(groups(ours), **options)
    reference = torch.optim.AdamW(groups(theirs), fused=True, **options)
    for step in range(50):
        for model in (ours, theirs):
            set_gradients(model, step, absent=step % 9)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.equal(b)
        assert optimizer.state[a].keys() == reference.state[b].keys()
        assert all(optimizer.state[a][name].equal(reference.state[b][name]) for name in reference.state[b])


def test_a_state_of_pytorchs_can_be_loaded() -> None:
    ours, theirs = network(), network()
    reference = torch.optim.AdamW(theirs.parameters(), fused=True)
    set_gradients(theirs, 0)
    reference.step()
    optimizer = AdamW(ours.parameters())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    ours.load_state_dict(theirs.state_dict())
    for model, either in ((ours, optimizer), (theirs, reference)):
        set_gradients(model, 1)
        either.step()
    assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_averages_of_the_pass_are_those_of_their_own() -> None:
    """Also of a parameter that no gradient has reached."""
    ours, theirs = network(), network()
    optimizers = [AdamW(model.parameters(), lr=1e-2) for model in (ours, theirs)]
    averages = [EMA(model, EMAConfig(decay=0.9)) for model in (ours, theirs)]
    for step in range(4):
        for model in (ours, theirs):
            set_gradients(model, step, absent=step)
        optimizers[0].step(ema=averages[0].at(step))
        optimizers[1].step()
        averages[1].update(step)
    for name, average in averages[0].shards.items():
        assert average.equal(averages[1].shards[name]), name


def test_a_closure_gives_the_loss() -> None:
    parameter = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert AdamW([parameter], lr=0.1).step(closure) == 3
    assert (parameter < 1).all()


@pytest.mark.parametrize(
    ("shape", "moments", "codes"),
    [
        ((32, 128), "8bit", True),
        ((32, 128), "fp32", False),
        ((31, 128), "8bit", False),
        ((64, 127), "8bit", False),
        ((5000,), "8bit", False),
        ((2, 3, 7, 128), "8bit", True),
        ((1, 32, 128), "8bit", False),
        ((), "8bit", False),
    ],
)
def test_which_moments_are_coded(shape: tuple[int, ...], moments: Moments, codes: bool) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    assert has_codes(parameter, moments) is codes
    optimizer = AdamW([parameter], moments=moments)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    assert ("exp_avg_codes" in optimizer.state[parameter]) is codes
    assert ("exp_avg" in optimizer.state[parameter]) is not codes


def test_what_stays_fp32_is_said_by_count_and_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dtrain"):
        build_optimizer(network(), OptimConfig())
        assert not caplog.messages
        build_optimizer(network(), OptimConfig(moments="8bit"))
    assert caplog.messages == [
        'optim.moments = "8bit": 5 of 6 parameters, 2,368 elements in all, are too small for it or '
        "have one row, and keep moments in fp32: 0.weight, 0.bias, 2.bias, 3.weight, 3.bias"
    ]


def regression(moments: Moments, dtype: torch.dtype = torch.float32) -> float:
    """Loss, from 3.8 on, of a network that learns what another computes."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16))

    teacher, model = build(0), build(1).to(dtype)
    nn.utils.vector_to_parameters(
        3 * nn.utils.parameters_to_vector(teacher.parameters()), teacher.parameters()
    )
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, moments=moments)
    generator, losses, steps = torch.Generator().manual_seed(0), [], 300
    for step in range(steps):
        x = torch.randn(128, 16, generator=generator)
        loss = (model(x.to(dtype)).float() - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


def test_coded_moments_and_bf16_weights_reach_the_loss_of_fp32() -> None:
    wanted = regression("fp32")
    assert wanted < 0.12
    assert regression("8bit") == pytest.approx(wanted, rel=0.01)
    assert regression("8bit", torch.bfloat16) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(moments: Moments, dtype: torch.dtype) -> None:
    """Codes, scales and fp32 moments of bf16 parameters come through as they are."""
    model = network().to(dtype)
    optimizer = AdamW(model.parameters(), moments=moments, seed=7)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = AdamW(other.parameters(), moments=moments, seed=7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for either, its_optimizer in ((model, optimizer), (other, resumed)):
            set_gradients(either, step)
            its_optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.equal(b)
        for name, value in optimizer.state[a].items():
            assert value.dtype == resumed.state[b][name].dtype
            assert value.equal(resumed.state[b][name])


def test_moments_of_another_kind_are_refused() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    set_gradients(model, 0)
    optimizer.step()
    other = AdamW(network().parameters(), moments="8bit")
    with pytest.raises(
        ValueError, match=r"moments = '8bit' needs exp_avg_codes.* of parameter 2.* cannot change"
    ):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r'moments = \'int8\': must be "fp32" or "8bit"'):
        AdamW(model.parameters(), moments="int8")  # type: ignore[arg-type]


@pytest.mark.usefixtures("single_process_group")
def test_a_checkpoint_with_other_moments_is_refused(tmp_path: Path) -> None:
    model = network()
    write_state(TrainingState(model, AdamW(model.parameters()), None), tmp_path)
    state = TrainingState(model, AdamW(model.parameters(), moments="8bit"), None)
    with pytest.raises(ValueError, match=r'optim.moments = "8bit", but .* has moments of another kind'):
        state.load(tmp_path)


@pytest.mark.usefixtures("single_process_group")
def test_codes_of_parameters_sharded_along_other_dims_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(1)]))
    parameter.grad = torch.ones_like(parameter)
    AdamW([parameter]).step()
    with pytest.raises(ValueError, match=r"\(64, 128\) is sharded along dim 1: moments .* need dim 0"):
        AdamW([parameter], moments="8bit").step()
    mesh = init_device_mesh("cpu", (1, 1))
    parameter = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(0), Shard(1)]))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"placed as .*must be Shard along one dim, or Replicate\(\)"):
        AdamW([parameter]).step()


def test_the_plan_counts_the_bytes_of_the_state() -> None:
    model = network()
    for moments in ("fp32", "8bit"):
        optimizer = AdamW(model.parameters(), moments=moments)
        set_gradients(model, 0)
        optimizer.step()
        state = [x for s in optimizer.state.values() for name, x in s.items() if name != "step"]
        held = sum(x.numel() * x.element_size() for x in state)
        assert state_bytes(model, 1, ema=False, moments=moments).optimizer == held


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    """The worker's results by the number of ranks; 1 and 3 load what 2 have saved."""
    folder = tmp_path_factory.mktemp("adamw")

    def run(ranks: int, start: Callable[..., object], *arguments: str) -> dict[str, dict[str, Tensor]]:
        start(WORKER, folder / f"{ranks}.pt", folder / "checkpoint", *arguments)
        results: dict[str, dict[str, Tensor]] = torch.load(folder / f"{ranks}.pt")
        return results

    return {
        2: run(2, lambda *a: torchrun(2, *a), "save", "1", "2"),
        1: run(1, run_python, "load"),
        3: run(3, lambda *a: torchrun(3, *a), "load"),
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [
        name for name, x in expected.items() if not (actual[name].dtype == x.dtype and actual[name].equal(x))
    ]


Runs = dict[int, dict[str, dict[str, Tensor]]]


@pytest.mark.distributed
def test_any_number_of_ranks_gives_the_same_bits(runs: Runs) -> None:
    expected = runs[1]["end-1"]
    names = {name.split(".", 1)[0] for name in expected}
    assert names == {"model", "optim", "ema"}
    assert {x.dtype for x in expected.values()} == {torch.float32, torch.uint8, torch.bfloat16}
    assert expected["optim.1.weight.exp_avg_sq_scale"].shape == (4, 9)
    for ranks, kind in ((2, "end-1"), (2, "end-2"), (3, "end-1")):
        assert_equal(runs[ranks][kind], expected)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_of_two_ranks_goes_on_at_others_bit_for_bit(runs: Runs, ranks: int) -> None:
    assert_equal(runs[ranks]["loaded"], runs[2]["half-1"])
    assert_equal(runs[ranks]["loaded-end"], runs[2]["end-1"])
