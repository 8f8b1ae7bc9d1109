"""The planner: its bytes, FLOPs and messages against those of real ranks and formulas."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.blocks import find_blocks
from dtrain.config import RunConfig, build_recipe, load
from dtrain.plan import plan as plan_module
from dtrain.plan.accounts import AVERAGES, WORKSPACE
from dtrain.plan.devices import device
from dtrain.plan.estimate import Rates
from dtrain.plan.fit import Fit, find_fit
from dtrain.plan.peak import find_peak
from dtrain.plan.plan import CONTEXT, FRAGMENTS, Plan, make_plan
from dtrain.plan.simulate import Simulation, simulate
from dtrain.sharding.shard import padded_parameters
from tests.dtrain import plan_worker
from tests.launch import run_python, torchrun

CONFIG = """
recipe = "uvit.recipe:video"
[train]
global_batch = 16
micro_batch = 4
[model]
input_size = [4, 32, 32]
patch_size = [1, 4, 4]
in_channels = 3
width = 192
depth = 4
heads = 3
qk_norm = true
final_conv = false
condition = "class"
num_classes = 145
[data]
kind = "shapes"
frames = 4
height = 32
width = 32
workers = 0
[comm]
exact_below = 0
"""
POLICIES = (
    'activations.policy="none"',
    'activations.policy="none";shard.reshard_after_forward=false',
    'activations.policy="full"',
    'activations.policy="full";activations.mlp_chunks=4',
    'activations.policy="full";activations.stash="int8"',
    'activations.policy="selective"',
    'activations.policy="budget";activations.budget_gib=0.02',
    'activations.policy="full";optim.weights="bf16";ema.dtype="bf16"',
)
# Kernels of a CPU convert bf16 in memory of their own: of these, what operators tell is compared.
BY_OPERATORS = (
    'activations.policy="full";shard.param_dtype="bfloat16";optim.moments="8bit"',
    'activations.policy="full";comm.preset="int8-int4"',
    'activations.policy="full";comm.preset="int4-delta"',
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.toml"
    path.write_text(CONFIG)
    return path


def simulated(config: Path, sets: str, world: int, arch: str = "") -> Simulation:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operators split work, and buffers, by it
    try:
        return simulate(load(config, sets.split(";") if sets else []), world, arch)
    finally:
        torch.set_num_threads(threads)


# Every setting on some number of ranks: none, full and selective; the others; none and int4-delta.
ON_RANKS = [
    (1, (POLICIES[0], POLICIES[2], POLICIES[5])),
    (2, (POLICIES[1], *POLICIES[3:5], *POLICIES[6:], *BY_OPERATORS[:2])),
    (4, (POLICIES[0], BY_OPERATORS[2])),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "sets"), ON_RANKS)
def test_the_planned_peak_is_that_of_real_ranks(config: Path, world: int, sets: tuple[str, ...]) -> None:
    out = config.parent / f"{world}.json"
    batch = f"train.global_batch={8 * world}"
    torchrun(world, Path(plan_worker.__file__), out, config, *(f"{each};{batch}" for each in sets))
    for each, real in json.loads(out.read_text()).items():
        simulation = simulated(config, each, world)
        held, peak = sum(simulation.start), find_peak(simulation).nbytes
        print(f"{world} ranks, {each}: planned {held:,}, {peak:,}, measured {real}")
        assert held == pytest.approx(real["held"], rel=1e-4), each
        exact = "budget" not in each and "comm" not in each
        assert peak == pytest.approx(real["by_operators"], rel=1e-3 if exact else 0.02), each
        if world == 1:
            assert peak == pytest.approx(real["peak"], rel=0.02), each


def flops(simulation: Simulation) -> int:
    return sum(work.flops for work in simulation.work)


def test_flops_are_those_of_the_formula(config: Path) -> None:
    none, full, selective = (
        flops(simulated(config, f'train.global_batch=8;activations.policy="{policy}"', 2))
        for policy in ("none", "full", "selective")
    )
    forward = build_recipe(load(config)).flops({"index": range(4)})
    tokens, width, blocks = 4 * 8 * 8 + 2, 192, 5
    attention = 4 * blocks * 4 * tokens**2 * width
    embedding = 2 * 4 * (tokens - 2) * (3 * 4 * 4) * width
    # Backwards every product twice, but pixels have no gradient; attention five products for two.
    assert none == 3 * forward + attention // 2 - embedding
    ends = 2 * embedding  # the head is as large
    last = blocks * 2 * 4 * tokens * width * 4 * width  # an MLP's last product, which nobody needs again
    assert full - none == forward - ends - last
    assert selective - none == forward - ends - last - attention


@pytest.mark.parametrize("world", [2, 8])
def test_messages_are_those_of_fsdp2(config: Path, world: int) -> None:
    """The table of positions (1, 258, 192) is cut along dim 1 or 2, not padded to a table a rank."""
    sent = simulated(config, f"train.global_batch={4 * world}", world).sent
    run = load(config)
    model = build_recipe(run).build()

    def sent_bytes(parameters: Iterable[Tensor]) -> int:
        rows = [(1 / world if p.shape == (1, 258, 192) else -(-p.shape[0] // world), p) for p in parameters]
        return 4 * (world - 1) * sum(round(row * math.prod(p.shape[1:])) for row, p in rows)

    whole = sent_bytes(model.parameters())
    blocks = sum(sent_bytes(block.parameters()) for block in find_blocks(model))
    totals = {
        kind: sum(s.wire_bytes for s in sent if s.kind == kind) for kind in ("all-gather", "reduce-scatter")
    }
    # Blocks are gathered twice, the rest stays after the forward.
    assert totals == {"all-gather": whole + blocks, "reduce-scatter": whole}
    assert len([s for s in sent if s.kind == "all-gather"]) == 2 * 5 + 1


def test_compressed_messages_are_counted(config: Path) -> None:
    sent = simulated(config, 'train.global_batch=8;comm.preset="int4-delta";optim.weights="bf16"', 2).sent
    numbers = sum(p.numel() for p in build_recipe(load(config)).build().parameters())
    total = sum(s.wire_bytes for s in sent if s.kind in ("all-gather", "all-to-all"))
    assert total / (numbers / 2) == pytest.approx(0.5 + 2 / 256 + 0.5 + 2 / 128, rel=0.03)


def plan(config: Path, sets: str, gpus: int, memory: int = 2**40) -> Plan:
    return make_plan(load(config, sets.split(";")), gpus, replace(device("h100"), memory_bytes=memory))


def test_what_does_not_fit_is_refused_with_what_to_change(config: Path) -> None:
    made = plan(config, "train.global_batch=16;mesh.replicate=2;mesh.shard=1", 2, CONTEXT + 2**20)
    assert not made.fits
    advice = "\n".join(made.advice)
    assert "mesh.shard = 1: each GPU holds 1/1 of the state" in advice
    assert "mesh.replicate = 1 would leave 1/2" in advice
    assert 'activations.policy = "none"' in advice
    assert plan(config, "train.global_batch=16", 2).advice == []


def test_a_table_that_every_rank_pads_is_named() -> None:
    model = nn.Module()
    model.positions = nn.Parameter(torch.empty(1, 2**15 + 1, 2**10 + 1, device="meta"))  # 8 divides neither
    model.divided = nn.Parameter(torch.empty(1, 2**15, 2**10, device="meta"))
    model.weight = nn.Parameter(torch.empty(8, 2**22, device="meta"))
    (line,) = padded_parameters(model, 8, torch.bfloat16)
    assert line.startswith("positions (1, 32769, 1025), 1 row(s) for 8 ranks")
    assert "0.50 GiB for 0.06" in line
    assert padded_parameters(model, 1, torch.bfloat16) == []


def test_what_a_run_would_choose_cannot_be_planned(config: Path) -> None:
    with pytest.raises(ValueError, match="name a preset to plan with"):
        simulated(config, 'train.global_batch=8;comm.preset="auto"', 2)


def test_kernels_are_planned_as_on_the_gpu(config: Path) -> None:
    """Ours keep less than PyTorch's, and attention is PyTorch's there, whose tensors a CPU has as well."""
    kept = [
        find_peak(simulated(config, f"train.global_batch=8;fusion.backend={backend}", 2, "sm_90")).kinds[
            "activations"
        ]
        for backend in ("auto", "reference")
    ]
    assert kept[0] < 0.8 * kept[1]


def test_compute_is_planned_in_the_gpus_dtype(config: Path) -> None:
    batch = "train.global_batch=8"
    auto, asked, cpu = (
        (peak := find_peak(simulated(config, sets, 2, arch))).nbytes - peak.kinds[WORKSPACE]
        for sets, arch in ((batch, "sm_90"), (f"{batch};shard.param_dtype=bfloat16", "sm_90"), (batch, ""))
    )
    assert auto == asked < 0.7 * cpu


FIT = "train.global_batch=2;model.depth=2;model.patch_size=[1,2,2]"


def fit(config: Path, peak: int) -> Fit:
    """What is found for 2 GPUs with room for so many bytes."""
    memory = CONTEXT + int((peak + 1) / (1 - FRAGMENTS))
    return find_fit(load(config, FIT.split(";")), 2, replace(device("h100"), memory_bytes=memory), Rates())


@pytest.fixture
def simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches for GPUs of several sizes simulate the same settings, each of them once."""
    found: dict[tuple[str, int, str], Simulation] = {}

    def once(config: RunConfig, world: int, arch: str) -> Simulation:
        asked = (repr(config), world, arch)
        if asked not in found:
            found[asked] = simulate(config, world, arch)
        return found[asked]

    monkeypatch.setattr(plan_module, "simulate", once)


@pytest.mark.usefixtures("simulated_once")
def test_the_first_that_fits_is_found_without_rounding(config: Path) -> None:
    roomy = fit(config, 2**40)
    assert roomy.plan is not None
    assert roomy.plan.config.activations.policy == "none"
    assert len(roomy.tried) == 1
    least = f'{FIT};train.micro_batch=1;activations.policy="full";activations.mlp_chunks=4'
    lean, host = (plan(config, f"{least};activations.stash={stash}", 2).peak for stash in ("device", "host"))
    middle = fit(config, (lean.nbytes + roomy.plan.peak.nbytes) // 2)
    assert middle.plan is not None
    assert middle.plan.fits
    assert middle.plan.config.activations.policy == "budget"
    tight = fit(config, lean.nbytes)
    assert tight.plan is not None
    assert tight.plan.peak.nbytes == lean.nbytes
    assert tight.rounds == ()
    nothing = fit(config, 2**20)
    assert nothing.plan is None
    assert all("by arithmetic" in words for _, words in nothing.tried)
    # Averages as bf16 save 2 bytes a parameter, moments of 8 bits almost 6, both 8: in turn, not before need.
    numbers = host.accounts[AVERAGES] // 4
    for saved, rounds in ((1, ("ema.dtype",)), (7, ("ema.dtype", "optim.moments"))):
        found = fit(config, host.nbytes - saved * numbers)
        assert found.plan is not None
        assert found.plan.fits
        assert found.rounds == rounds
        assert len([name for name, _ in found.tried if "ema.dtype" in name]) <= 4


def test_the_command_line(config: Path, tmp_path: Path) -> None:
    arguments = ("-m", "dtrain", "plan", config, "--gpus", "64", "--set", "train.global_batch=256")
    shown = run_python(*arguments, "--out", tmp_path).stdout
    assert "64 x NVIDIA H100" in shown
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["fits"]
    assert sum(made["peak_accounts"].values()) == made["peak_bytes"]
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    wrong = run_python(*arguments, "--device", "h1000", check=False)
    assert wrong.returncode
    assert "must be one of a100" in wrong.stdout + wrong.stderr
