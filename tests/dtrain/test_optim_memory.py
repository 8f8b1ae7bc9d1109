"""bf16 weights without a copy in fp32, bf16 averages: right in mean, exact on disk, the same on any mesh."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.checkpoint import TrainingState
from dtrain.export import read_weights
from dtrain.optim import EMA, AdamW, Average, EMAConfig, OptimConfig, build_optimizer, gradient_norm
from dtrain.optim import ema as ema_module
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.precision import DTYPES, Precision, convert_weights
from dtrain.sharding.shard import ShardConfig
from tests.checkpoints import write_state
from tests.dtrain.tiny_dit import TinyDiT
from tests.launch import ROOT, run_python, torchrun

WORKER = ROOT / "tests" / "dtrain" / "optim_memory_worker.py"
COUNT, WEIGHT = 2**16, 1e-4
GAP = 2**-7  # of bf16 numbers in [1, 2)


def by_itself(parameter: nn.Parameter, average: Average, _step: int) -> None:
    average.take_in([parameter])


def in_the_pass(parameter: nn.Parameter, average: Average, step: int) -> None:
    """A learning rate of zero leaves the parameter as it is."""
    optimizer = AdamW([parameter], lr=0.0, weight_decay=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["step"].fill_(step + 1)
    optimizer.step(ema=average)


@pytest.mark.parametrize("take_in", [by_itself, in_the_pass])
def test_a_bf16_average_moves_where_rounding_to_nearest_stands_still(
    take_in: Callable[[nn.Parameter, Average, int], None],
) -> None:
    """Its mean is exact; its variance is Σ |change| · gap, less what fractions of a gap take off."""
    net = nn.Linear(COUNT, 1, bias=False)
    nn.init.ones_(net.weight)
    ema = EMA(net, EMAConfig(decay=1 - WEIGHT, warmup=False, dtype="bf16"))
    nn.init.constant_(net.weight, 2.0)
    nearest = torch.ones((), dtype=torch.bfloat16)
    steps = 60
    for step in range(steps):
        take_in(net.weight, ema.at(step), step)
        nearest += WEIGHT * (2.0 - nearest.float())
    assert nearest == 1
    moved, change = ema.shards["weight"].float() - 1, 1 - (1 - WEIGHT) ** steps
    deviation = (change * GAP) ** 0.5
    assert float(moved.mean()) == pytest.approx(change, abs=5 * deviation / COUNT**0.5)
    assert float(moved.std()) == pytest.approx(deviation, rel=0.1)


def test_chance_belongs_to_places_steps_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def averages(seed: int, step: int) -> dict[str, Tensor]:
        net = nn.Sequential(nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False))
        for layer in net:
            nn.init.ones_(layer.weight)
        ema = EMA(net, EMAConfig(decay=0.5, warmup=False, dtype="bf16"), seed)
        for layer in net:
            nn.init.constant_(layer.weight, 1.004)
        ema.update(step)
        return ema.shards

    first = averages(1, 2)
    assert not first["0.weight"].equal(first["1.weight"])
    assert not first["0.weight"].equal(averages(1, 3)["0.weight"])
    assert not first["0.weight"].equal(averages(2, 2)["0.weight"])
    monkeypatch.setattr(ema_module, "_PIECE", 1000)
    assert all(first[name].equal(x) for name, x in averages(1, 2).items())


@pytest.mark.parametrize("average", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_swapping_brings_every_bit_back(weights: Precision, average: Precision) -> None:
    torch.manual_seed(0)
    net = convert_weights(nn.Linear(33, 7), weights)
    ema = EMA(net, EMAConfig(dtype=average))
    for name in ema.shards:
        ema.shards[name] += torch.randn_like(ema.shards[name])
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    averaged = {name: x.clone() for name, x in ema.shards.items()}
    with ema.swapped_into(net):
        for name, p in net.named_parameters():
            assert p.equal(averaged[name].to(p.dtype))
            assert not p.equal(trained[name])
    assert all(p.equal(trained[name]) for name, p in net.named_parameters())
    assert all(x.dtype == DTYPES[average] and x.equal(averaged[name]) for name, x in ema.shards.items())


def test_converting_takes_frozen_and_tied_parameters_and_leaves_buffers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[2].weight
    net[1].bias.requires_grad_(False)
    convert_weights(net, "bf16")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net[1].weight is net[2].weight
    assert not net[1].bias.requires_grad
    assert net[0].running_mean.dtype == torch.float32
    assert not caplog.messages
    convert_weights(net, "fp32")
    assert caplog.messages == ['optim.weights = "fp32": 5 parameters that the model builds otherwise']
    with pytest.raises(ValueError, match=r'optim.weights = \'fp16\': must be "fp32" or "bf16"'):
        convert_weights(net, "fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'ema.dtype = \'fp16\': must be "fp32" or "bf16"'):
        EMAConfig(dtype="fp16")  # type: ignore[arg-type]


def test_the_norm_of_bf16_gradients_has_more_than_eight_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (1000, 77, 3)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
    exact = torch.cat([p.grad for p in parameters]).double().norm()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
    plain = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert float(plain) != pytest.approx(float(exact), rel=1e-4)


def tiny(weights: Precision, config: ShardConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = TinyDiT(features=6, width=24, depth=2, heads=2, dropout=0.0)
    model.time.weight.requires_grad_(False)
    convert_weights(model, weights)
    return parallelize(
        model, build_mesh(MeshConfig(), 1, "cpu"), ParallelConfig(shard=config or ShardConfig())
    )


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_compute_has_a_dtype_of_its_own(compute: Any) -> None:
    """bf16 shards are cast up for compute in fp32, which is that of fp32 shards with the same numbers."""
    model, x, t = tiny("bf16", ShardConfig(param_dtype=compute)), torch.randn(2, 5, 6), torch.rand(2)
    twin = tiny("fp32", ShardConfig(param_dtype=compute))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p.detach())
    seen: set[torch.dtype] = set()
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))  # type: ignore[union-attr, index]
    out = model(x, t)
    handle.remove()
    assert seen == {getattr(torch, compute)}
    assert out.equal(twin(x, t))
    for either in (out, twin(x, t)):
        either.float().square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
        if p.grad is not None and q.grad is not None:
            assert p.grad.dtype == torch.bfloat16
            assert local(p.grad).equal(local(q.grad).bfloat16())


def local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def training_state(weights: Precision, average: Precision, seed: int = 0) -> TrainingState:
    model = tiny(weights)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, warmup_steps=0), seed)
    ema = EMA(model, EMAConfig(dtype=average), seed)
    for step in range(2):
        model(torch.randn(2, 5, 6), torch.rand(2)).square().mean().backward()
        optimizer.step(ema=ema.at(step))
        optimizer.zero_grad()
    return TrainingState(model, optimizer, ema)


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize(("theirs", "ours"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_a_checkpoint_of_another_precision_is_converted_and_said(
    theirs: Precision, ours: Precision, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = training_state(theirs, theirs)
    write_state(saved, tmp_path)
    state = training_state(ours, ours, seed=1)
    with caplog.at_level(logging.WARNING, "dtrain"):
        state.load(tmp_path)
    for kind in ("model", "ema"):
        before, after = saved.tensors()[kind], state.tensors()[kind]
        assert before.keys() == after.keys()
        assert all(after[name].dtype == DTYPES[ours] for name in after)
        assert all(local(after[name]).equal(local(before[name]).to(DTYPES[ours])) for name in after)
    how = "rounded to nearest, once" if ours == "bf16" else "taken exactly"
    fields = ("optim.weights", "ema.dtype") if theirs != ours else ()
    said = [record.getMessage() for record in caplog.records if record.name == "dtrain.checkpoint.state"]
    assert said == [f'{field} = "{ours}": what {tmp_path} has in {theirs} is {how}.' for field in fields]


@pytest.mark.usefixtures("single_process_group")
def test_offload_on_a_cpu_is_said_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny("bf16")
    with caplog.at_level(logging.WARNING, "dtrain"):
        offloaded = tiny("bf16", ShardConfig(cpu_offload=True))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "shard.cpu_offload = true: changes nothing on the CPU, where all is on the host anyway."
    ]
    x, t = torch.randn(2, 5, 6), torch.rand(2)
    assert plain(x, t).equal(offloaded(x, t))


Runs = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The worker's results by the number of ranks; 2 load what 4 have saved, and 1 what these save then."""
    folder = tmp_path_factory.mktemp("optim_memory")

    def run(ranks: int, mode: str) -> dict[str, Any]:
        arguments = (WORKER, folder / f"{ranks}.pt", folder, mode)
        if ranks == 1:
            run_python(*arguments)
        else:
            torchrun(ranks, *arguments)
        results: dict[str, Any] = torch.load(folder / f"{ranks}.pt")
        return results

    found = {4: run(4, "replicas"), 2: run(2, "compressed"), 1: run(1, "resharding")}
    return found | {0: read_weights(folder / "4")}  # as for export and sampling, without a process group


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [n for n, x in expected.items() if not (actual[n].dtype == x.dtype and actual[n].equal(x))]


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["start", "half", "end"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_any_number_of_ranks_gives_the_same_bits(runs: Runs, ranks: int, moment: str) -> None:
    assert not differing(runs[ranks][moment], runs[2][moment])


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_of_four_ranks_goes_on_at_fewer_bit_for_bit(runs: Runs, ranks: int) -> None:
    expected = runs[4]["half"]
    assert {x.dtype for n, x in expected.items() if n[:5] in ("model", "ema.0")} == {torch.bfloat16}
    assert expected["optim.1.weight.exp_avg_codes"].dtype == torch.uint8
    assert differing(expected, runs[4]["start"])
    assert not differing(runs[ranks]["loaded"], expected)
    assert not differing(runs[ranks]["loaded-end"], runs[4]["end"])


@pytest.mark.distributed
def test_weights_come_whole_out_of_a_checkpoint_of_four_ranks(runs: Runs) -> None:
    assert "table" in runs[0]
    for name, weight in runs[0].items():
        assert weight.equal(runs[4]["half"][f"ema.{name}" if name != "2.bias" else f"model.{name}"]), name


@pytest.mark.distributed
def test_a_run_begins_with_the_weights_of_fp32_rounded_to_nearest(runs: Runs) -> None:
    from dtrain.sharding.init import fill_parameters
    from tests.dtrain.optim_memory_worker import normal

    exact = nn.Sequential(nn.Linear(256, 50), nn.Linear(1030, 5), nn.Linear(16, 3))
    exact.table = nn.Parameter(torch.empty(1, 130, 128))
    fill_parameters(exact, normal, seed=1)
    for name, p in exact.named_parameters():
        assert runs[4]["start"][f"model.{name}"].equal(p.bfloat16())


@pytest.mark.distributed
def test_planned_bytes_are_those_of_real_tensors(runs: Runs) -> None:
    held = runs[2]["bytes"]
    assert len(held) == 8
    assert {name: numbers[4:] for name, numbers in held.items()} == {
        name: numbers[:4] for name, numbers in held.items()
    }
    parameters, gradients, _, averages = held["bf16-8bit-bf16"][:4]
    assert (2 * parameters, 2 * gradients, 2 * averages) == tuple(
        held["fp32-fp32-fp32"][i] for i in (0, 1, 3)
    )


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["none", "int8-int4"])
def test_replicas_stay_equal_bit_for_bit(runs: Runs, preset: str) -> None:
    ranks = runs[4]["replicas"][preset]
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    assert ranks[0] != ranks[1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        ("none-torch.bfloat16", 0.0),
        ("bf16-torch.float32", 0.0),
        ("int8-torch.bfloat16", 5e-3),
        ("int8-int4-torch.float32", 5e-3),
        ("int4-delta-torch.float32", 5e-4),
        ("int4-delta-torch.bfloat16", 5e-4),
    ],
)
def test_compressed_collectives_carry_bf16_masters(runs: Runs, scheme: str, error: float) -> None:
    """All ranks decode the same weights; in bf16 they are the masters themselves."""
    found = runs[2]["compressed"][scheme]
    assert found["digests"][0] == found["digests"][1]
    assert found["error"] == pytest.approx(error, rel=0.3)
    assert found["dtypes"] == {scheme.partition("-torch.")[2].join(("torch.", ""))}
    assert found["masters"] == found["gradients"] == {"torch.bfloat16"}
    assert found["loss"] == pytest.approx(runs[2]["compressed"]["none-torch.bfloat16"]["loss"], rel=5e-3)
