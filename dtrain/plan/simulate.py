"""A training step of rank 0, on tensors without data: what it holds, computes and sends.

The model, FSDP2, collectives and policies are the run's own code; only the numbers are missing, and the other
ranks: the process group has W of them and talks to none. So buffers, lifetimes and counts are the run's own,
for any W, without a GPU. Kernels are chosen as on the GPU that is planned for, and their launches left out.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from dtrain.blocks import find_blocks
from dtrain.build import build_sharded
from dtrain.config import RunConfig, build_recipe, check_world
from dtrain.ema import EMA
from dtrain.kernels.launch import planned_for
from dtrain.mesh import build_mesh
from dtrain.optim import build_optimizer
from dtrain.parallelize import CompileConfig
from dtrain.plan.accounts import (
    AVERAGES,
    BACKWARD,
    BATCH,
    GRADIENTS,
    HOST,
    OPTIMIZER,
    PARAMETERS,
    activations,
)
from dtrain.plan.ledger import Event, Ledger, Mark
from dtrain.plan.watch import watched
from dtrain.plan.wire import Sent
from dtrain.plan.work import Work
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.shard import compute_dtype, padded_parameters, to_empty
from dtrain.step import accumulate_gradients

__all__ = ["Simulation", "simulate"]

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Simulation:
    """One step of rank 0.

    Attributes:
        accounts: names by number.
        start: bytes of each account when the step begins.
        events: of the step.
        marks: what begins at which event.
        sent: collectives.
        work: of each operator.
        parameters: of the model.
        padded: parameters that are gathered several times over, in words.
        micro_batches: of the step, at most two: the third holds what the second does.
    """

    accounts: tuple[str, ...]
    start: tuple[int, ...]
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]
    sent: tuple[Sent, ...]
    work: tuple[Work, ...]
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
    batches = _faked(_batches(recipe, config, world), mode)
    with _alone(world), ExitStack() as stack:
        mesh = build_mesh(config.mesh, world, "cpu")  # reads tensors of its own
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
        if arch:
            stack.enter_context(planned_for(arch))
        # On meta, before there are fake tensors: FSDP2 cuts each parameter into a tensor for every rank.
        model = build_sharded(recipe, config, mesh)
        stack.enter_context(mode)
        return _Step(config, recipe, mesh, model, Ledger("cuda" if arch else "cpu")).run(batches)


@contextmanager
def _alone(world: int) -> Iterator[None]:
    """A process group of `world` ranks, of which this is the first and the only one."""
    # Registers the backend; there is no public door to it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a process group is up already: plan in a process of its own")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _batches(recipe: Recipe, config: RunConfig, world: int) -> list[Batch]:
    state = DataState(config.seed, 0, config.train.micro_batch)
    stream = iter(recipe.data(0, world, state))
    return [next(stream) for _ in range(min(2, config.train.accumulation(world)))]


def _faked(batches: list[Batch], mode: FakeTensorMode) -> list[Batch]:
    """Tensors without data; but indices, which random streams are keyed by, as numbers."""
    return [
        {
            key: mode.from_tensor(value) if isinstance(value, Tensor) and key != "index" else value
            for key, value in batch.items()
        }
        | {"index": [int(i) for i in batch["index"]]}
        for batch in batches
    ]


def _totals(events: Iterable[Event], accounts: int) -> list[int]:
    totals = [0] * accounts
    for delta, account in events:
        totals[account] += delta
    return totals


class _Step:
    """The state of the run, and the step."""

    def __init__(
        self, config: RunConfig, recipe: Recipe, mesh: DeviceMesh, model: nn.Module, ledger: Ledger
    ) -> None:
        self.config, self.recipe, self.model, self.ledger = config, recipe, model, ledger
        blocks = find_blocks(self.model, recipe.blocks(self.model) if recipe.blocks else None)
        names = {module: name for name, module in self.model.named_modules()}
        self.blocks = {names[block]: block for block in blocks}
        self.parameters = sum(p.numel() for p in self.model.parameters())
        dtype = compute_dtype(config.shard, ledger.device_type)
        self.padded = tuple(padded_parameters(self.model, mesh.size(mesh.ndim - 1), dtype))
        to_empty(self.model, config.shard, _CPU)
        self.optimizer = build_optimizer(self.model, config.optim, config.seed)
        self.ema = EMA(self.model, config.ema) if config.ema.enabled else None

    def run(self, batches: list[Batch]) -> Simulation:
        """Take one step to warm up, whose buffers may stay, and note another one."""
        ledger = self.ledger
        self.optimizer.make_state()
        self._assign_state(batches)
        with watched(ledger), self._scopes(), ledger:
            self._gradients(batches)
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.step()  # of nothing, but weights count as changed
            before = len(ledger.events)
            start = _totals(ledger.events, len(ledger.accounts))
            for noted in (ledger.marks, ledger.sent, ledger.work):
                noted.clear()
            self._gradients(batches)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                ledger.claim(parameter.grad, HOST if self.config.shard.cpu_offload else GRADIENTS)
        ledger.mark("update")
        count = len(ledger.accounts)
        return Simulation(
            accounts=tuple(ledger.accounts),
            start=(*start, *[0] * (count - len(start))),
            events=tuple(ledger.events[before:]),
            marks=tuple(Mark(mark.event - before, mark.name) for mark in ledger.marks),
            sent=tuple(ledger.sent),
            work=tuple(ledger.work),
            parameters=self.parameters,
            padded=self.padded,
            micro_batches=len(batches),
        )

    def _gradients(self, batches: list[Batch]) -> None:
        accumulate_gradients(
            self.model,
            self.recipe,
            batches,
            seed=self.config.seed,
            device=_CPU,
            reduce_each=self.config.shard.reduce_each_micro_batch,
        )

    def _assign_state(self, batches: list[Batch]) -> None:
        groups: dict[str, list[Any]] = {
            PARAMETERS: [*self.model.parameters(), *self.model.buffers()],
            OPTIMIZER: [x for state in self.optimizer.state.values() for x in state.values()],
            AVERAGES: [*self.ema.shards.values()] if self.ema else [],
            BATCH: [x for batch in batches for x in batch.values() if isinstance(x, Tensor)],
        }
        for account, tensors in groups.items():
            on_host = self.config.shard.cpu_offload and account != BATCH
            for tensor in tensors:
                self.ledger.assign(tensor, HOST if on_host else account)

    @contextmanager
    def _scopes(self) -> Iterator[None]:
        """Accounts of what forward and backward allocate."""
        ledger, entered = self.ledger, []
        handles = []

        def enter(account: str) -> Any:
            def hook(*_: Any) -> None:
                entered.append(ledger.enter(account))

            return hook

        def leave(*_: Any) -> None:
            ledger.leave(entered.pop())

        def begin(*_: Any) -> None:
            ledger.mark("forward")
            entered.append(ledger.enter(activations("")))

        def turn(*_: Any) -> None:
            entered.pop()
            ledger.mark("backward")
            ledger.enter(BACKWARD)

        for name, block in self.blocks.items():
            handles += [
                block.register_forward_pre_hook(enter(activations(name)), prepend=True),
                block.register_forward_hook(leave),
            ]
        handles += [
            self.model.register_forward_pre_hook(begin, prepend=True),
            self.model.register_forward_hook(turn),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
