"""A rung without a GPU: rank 0 of the world takes its step on tensors without data."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.ladder.baselines import baseline
from benchmarks.ladder.recipe import LatentsConfig, first_batch
from benchmarks.ladder.result import Row
from benchmarks.ladder.rungs import RUNGS, Rung
from benchmarks.ladder.workloads import WORKLOADS, Workload
from dtrain.config import RunConfig, build_recipe
from dtrain.plan.devices import device
from dtrain.plan.estimate import Rates, estimate
from dtrain.plan.fake import alone, faked, without_data
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Observed, observe
from dtrain.plan.peak import Peak, find_peak
from dtrain.plan.simulate import simulate
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.shard import ShardConfig
from dtrain.step import TrainConfig

__all__ = ["config_of", "plan_peak", "plan_rung", "plan_rungs", "quiet"]


def plan_rung(workload: str, rung: str, world: int, gpu: str) -> Row:
    """Peak, work and estimated time of one step.

    Args:
        workload, rung: names.
        world: ranks, of which the first one steps.
        gpu: that is planned for, see `dtrain.plan.devices`.
    """
    planned = device(gpu)
    observed = _step(WORKLOADS[workload], RUNGS[rung], world, planned.arch)
    peak, cost = find_peak(observed), estimate(observed, planned, Rates())
    return Row(
        workload=workload,
        rung=rung,
        world=world,
        peak_bytes=peak.nbytes,
        kinds={kind: nbytes for kind, nbytes in peak.kinds.items() if nbytes},
        when=peak.when,
        host_bytes=peak.host_bytes,
        flops=cost.flops,
        wire_bytes=cost.wire_bytes,
        step_s=cost.step_s,
    )


def plan_peak(workload: Workload, rung: Rung, world: int, arch: str) -> Peak:
    """The peak alone, on a GPU of that architecture; on a CPU for ""."""
    return find_peak(_step(workload, rung, world, arch))


def plan_rungs(tasks: Sequence[tuple[str, str, int, str]], jobs: int) -> Iterator[Row]:
    """The same of many (workload, rung, world, GPU), in processes of their own."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=quiet) as pool:
        yield from pool.map(plan_rung, *zip(*tasks, strict=True))


def quiet() -> None:
    """One of many processes: one thread, errors only."""
    torch.set_num_threads(1)
    logging.getLogger("dtrain").setLevel(logging.ERROR)  # every rung would say the same


def config_of(
    workload: Workload, rung: Rung, world: int, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> RunConfig:
    """The run of a rung, computed in `dtype`; for baselines its recipe is what counts."""
    body: Literal["dit", "uvit", "plain"] = (
        "dit" if workload.kind == "dit" else "uvit" if rung.base == "dtrain" else "plain"
    )
    return RunConfig(
        recipe="benchmarks.ladder.recipe:latents",
        name=workload.name,
        train=TrainConfig(global_batch=workload.samples * world, micro_batch=workload.samples),
        shard=ShardConfig(param_dtype=dtype),
        activations=rung.activations,
        optim=rung.optim,
        ema=rung.ema,
        recipe_config=LatentsConfig(workload.model, body),
    )


def _step(workload: Workload, rung: Rung, world: int, arch: str) -> Observed:
    config = config_of(workload, rung, world)
    if rung.base == "dtrain":
        return simulate(config, world, arch)
    recipe, mode = build_recipe(config), FakeTensorMode(allow_non_fake_inputs=True)
    [batch] = faked([first_batch(recipe, workload.samples)], mode)
    with alone(world):
        mesh = build_mesh(MeshConfig(), world, "cpu")  # reads tensors of its own
        with without_data(mode, arch):
            ledger = Ledger("cuda" if arch else "cpu")
            return observe(baseline(recipe, rung, batch, mesh, ledger), ledger)
