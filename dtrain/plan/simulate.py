"""A training step of rank 0 of a run, on tensors without data: what it holds, computes and sends.

The model, FSDP2, collectives and policies are the run's own code; only the numbers are missing, and the other
ranks: the process group has W of them and talks to none. So buffers, lifetimes and counts are the run's own,
for any W, without a GPU. Kernels are chosen as on the GPU that is planned for, and their launches left out.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from dtrain.blocks import named_blocks
from dtrain.build import build_sharded
from dtrain.config import RunConfig, build_recipe, check_world
from dtrain.kernels.launch import planned_for
from dtrain.optim import EMA, build_optimizer
from dtrain.parallelize import CompileConfig
from dtrain.plan.accounts import AVERAGES, BATCH, GRADIENTS, HOST, OPTIMIZER, PARAMETERS
from dtrain.plan.fake import alone, faked, without_data
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Observed, Subject, observe
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.sharding.mesh import build_mesh
from dtrain.sharding.shard import compute_dtype, padded_parameters, to_empty
from dtrain.step import accumulate_gradients

__all__ = ["Simulation", "simulate"]

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Simulation(Observed):
    """One step of rank 0.

    Attributes:
        parameters: of the model.
        padded: parameters that are gathered several times over, in words.
        micro_batches: of the step, at most two: the third holds what the second does.
    """

    parameters: int
    padded: tuple[str, ...]
    micro_batches: int


def simulate(config: RunConfig, world: int, arch: str = "") -> Simulation:
    """Take one step, the first behind a warm-up, of rank 0 of `world`.

    Args:
        config: of the run.
        world: ranks.
        arch: GPU that is planned for, such as "sm_90"; "" plans for CPU ranks.
    Raises:
        ValueError: the config does not fit the world, leaves its collectives to be chosen, or a process group
            is up already.
    """
    check_world(config, world)
    if config.comm.preset == "auto":
        raise ValueError('comm.preset = "auto" is chosen on the links of a run: name a preset to plan with.')
    if config.compile.enabled:
        log.info("planned without torch.compile, which keeps no more than this and often less")
        config = replace(config, compile=CompileConfig())
    if arch and config.shard.param_dtype == "auto":  # as on a GPU
        config = replace(config, shard=replace(config.shard, param_dtype="bfloat16"))
    recipe = build_recipe(config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batches = faked(_batches(recipe, config, world), mode)
    with alone(world), planned_for(arch) if arch else nullcontext():
        mesh = build_mesh(config.mesh, world, "cpu")  # reads tensors of its own
        # On meta, before there are fake tensors: FSDP2 cuts each parameter into a tensor for every rank.
        model = build_sharded(recipe, config, mesh)
        with without_data(mode, arch):
            return _simulate(config, recipe, mesh, model, batches, "cuda" if arch else "cpu")


def _simulate(
    config: RunConfig,
    recipe: Recipe,
    mesh: DeviceMesh,
    model: nn.Module,
    batches: Sequence[Batch],
    device_type: str,
) -> Simulation:
    blocks = named_blocks(model, recipe.blocks(model) if recipe.blocks else None)
    parameters = sum(p.numel() for p in model.parameters())
    padded = padded_parameters(model, mesh.size(mesh.ndim - 1), compute_dtype(config.shard, device_type))
    to_empty(model, config.shard, _CPU)
    optimizer = build_optimizer(model, config.optim, config.seed)
    optimizer.make_state()
    ema = EMA(model, config.ema) if config.ema.enabled else None
    offloaded = config.shard.cpu_offload
    kept: dict[str, Iterable[Tensor]] = {
        PARAMETERS: [*model.parameters(), *model.buffers()],
        OPTIMIZER: [x for state in optimizer.state.values() for x in state.values()],
        AVERAGES: [*ema.shards.values()] if ema else [],
    }
    if offloaded:
        kept = {HOST: [x for tensors in kept.values() for x in tensors]}
    gradients = partial(
        accumulate_gradients,
        model,
        recipe,
        batches,
        seed=config.seed,
        device=_CPU,
        reduce_each=config.shard.reduce_each_micro_batch,
    )
    subject = Subject(
        model=model,
        blocks=blocks,
        gradients=gradients,
        optimizer=optimizer,
        state={**kept, BATCH: [x for batch in batches for x in batch.values() if isinstance(x, Tensor)]},
        gradients_account=HOST if offloaded else GRADIENTS,
    )
    observed = observe(subject, Ledger(device_type))
    return Simulation(
        **vars(observed), parameters=parameters, padded=tuple(padded), micro_batches=len(batches)
    )


def _batches(recipe: Recipe, config: RunConfig, world: int) -> list[Batch]:
    state = DataState(config.seed, 0, config.train.micro_batch)
    stream = iter(recipe.data(0, world, state))
    return [next(stream) for _ in range(min(2, config.train.accumulation(world)))]
