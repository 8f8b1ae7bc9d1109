"""A rung without a GPU: rank 0 of the world takes its step on tensors without data."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.ladder.baselines import ddp, fsdp2
from benchmarks.ladder.result import Row
from benchmarks.ladder.rungs import RUNGS, Rung
from benchmarks.ladder.workloads import WORKLOADS, Workload
from dtrain.config import RunConfig, build_recipe, from_table
from dtrain.mesh import MeshConfig, build_mesh
from dtrain.plan.devices import device
from dtrain.plan.estimate import Rates, estimate
from dtrain.plan.fake import alone, faked, without_data
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Observed, observe
from dtrain.plan.peak import find_peak
from dtrain.plan.simulate import simulate
from dtrain.recipe import DataState

__all__ = ["config_of", "plan_rung", "plan_rungs"]


def plan_rung(workload: str, rung: str, world: int, gpu: str) -> Row:
    """Peak, work and estimated time of one step.

    Args:
        workload, rung: names.
        world: ranks, of which the first one steps.
        gpu: that is planned for, see `dtrain.plan.devices`.
    """
    planned = device(gpu)
    config = config_of(WORKLOADS[workload], RUNGS[rung], world)
    observed = _step(config, RUNGS[rung], world, planned.arch)
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


def plan_rungs(tasks: Sequence[tuple[str, str, int, str]], jobs: int) -> Iterator[Row]:
    """The same of many (workload, rung, world, GPU), in processes of their own."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quiet) as pool:
        yield from pool.map(plan_rung, *zip(*tasks, strict=True))


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("dtrain").setLevel(logging.ERROR)  # every rung would say the same


def config_of(workload: Workload, rung: Rung, world: int) -> RunConfig:
    """The run of a rung; for baselines its recipe is what counts."""
    body = "dit" if workload.kind == "dit" else "uvit" if rung.base == "dtrain" else "plain"
    batch = {"global_batch": workload.samples * world, "micro_batch": workload.samples}
    tables = {name: dict(table) for name, table in rung.tables.items()}
    return from_table(
        {
            "recipe": "benchmarks.ladder.recipe:latents",
            "name": workload.name,
            "model": workload.model,
            "body": body,
            "train": batch,
            **tables,
        }
    )


def _step(config: RunConfig, rung: Rung, world: int, arch: str) -> Observed:
    if rung.base == "dtrain":
        return simulate(config, world, arch)
    recipe, mode = build_recipe(config), FakeTensorMode(allow_non_fake_inputs=True)
    stream = recipe.data(0, world, DataState(config.seed, 0, config.train.micro_batch))
    [batch] = faked([next(iter(stream))], mode)
    with alone(world):
        mesh = build_mesh(MeshConfig(), world, "cpu")  # reads tensors of its own
        with without_data(mode, arch):
            ledger = Ledger("cuda")
            if rung.base == "ddp":
                subject = ddp(recipe, batch, rung.checkpointing, ledger)
            else:
                subject = fsdp2(recipe, batch, rung.checkpointing, mesh)
            return observe(subject, ledger)
