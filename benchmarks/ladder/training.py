"""A rung that really trains: rank 0 of a process group that is up, on a GPU or a CPU, with random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from benchmarks.ladder.baselines import baseline
from benchmarks.ladder.planned import config_of
from benchmarks.ladder.recipe import first_batch
from benchmarks.ladder.rungs import Rung
from benchmarks.ladder.workloads import Workload
from dtrain.build import build_sharded
from dtrain.config import RunConfig, build_recipe
from dtrain.optim import EMA, build_optimizer, gradient_norm
from dtrain.plan.accounts import AVERAGES
from dtrain.plan.observe import Subject
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.local import local_part
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.shard import to_empty
from dtrain.step import accumulate_gradients, to_device, train_step

__all__ = ["Training", "start"]

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Training:
    """A model, its optimizer and its averages.

    Attributes:
        model: its parameters are this rank's.
        gradients: forward and backward; returns the loss.
        step: a whole step.
        held: tensors that are there before a step.
        buckets_bytes: of gradients that stay, beside them.
    """

    model: nn.Module
    gradients: Callable[[], Tensor]
    step: Callable[[], object]
    held: Sequence[Tensor]
    buckets_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Of all that is there before a step, each storage once."""
        storages = (local_part(tensor.detach()).untyped_storage() for tensor in self.held)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + self.buckets_bytes


def start(
    workload: Workload, rung: Rung, world: int, device: torch.device, dtype: Dtype = "bfloat16"
) -> Training:
    """Build a rung, with its state, ready to step.

    Args:
        world: ranks of the process group. If it is a fake one, see `dtrain.plan.fake.alone`, what is
            allocated and computed is right, and numbers are not.
        device: of this rank.
        dtype: of compute.
    """
    config = config_of(workload, rung, world, dtype)
    mesh = build_mesh(MeshConfig(), world, device.type)
    recipe = build_recipe(config)
    batch = to_device(first_batch(recipe, workload.samples), device) | {"index": range(workload.samples)}
    recipe = _drawn_once(recipe, batch, config.seed)
    if rung.base == "dtrain":
        return _ours(config, recipe, batch, mesh)
    return _plain(baseline(recipe, rung, batch, mesh, dtype=getattr(torch, dtype)), rung)


def _plain(subject: Subject, rung: Rung) -> Training:
    _fill(subject.model)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    averages = [local_part(average) for average in subject.state[AVERAGES]]
    optimizer, gradients = subject.optimizer, cast(Callable[[], Tensor], subject.gradients)
    optimizer.register_step_pre_hook(_draw_gradients)

    def step() -> None:
        gradients()
        gradient_norm(parameters)  # ours tells it too
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, [local_part(p) for p in parameters], 1e-4)

    held = [tensor for tensors in subject.state.values() for tensor in tensors]
    buckets_bytes = sum(4 * p.numel() for p in parameters) if rung.base == "ddp" else 0
    return Training(subject.model, gradients, step, held, buckets_bytes)


def _ours(config: RunConfig, recipe: Recipe, batch: Batch, mesh: DeviceMesh) -> Training:
    device = batch["x"].device
    model = to_empty(build_sharded(recipe, config, mesh), config.shard, device)
    _fill(model)
    optimizer = build_optimizer(model, config.optim, config.seed)
    optimizer.make_state()
    optimizer.register_step_pre_hook(_draw_gradients)
    ema = EMA(model, config.ema, config.seed)
    how: dict[str, Any] = {
        "seed": config.seed, "device": device, "reduce_each": config.shard.reduce_each_micro_batch
    }  # fmt: skip
    gradients = partial(accumulate_gradients, model, recipe, [batch], **how)
    step = partial(train_step, model, recipe, optimizer, [batch], ema=ema.at(0), **how)
    state = [x for kept in optimizer.state.values() for x in kept.values()]
    held = [*model.parameters(), *model.buffers(), *state, *ema.shards.values(), batch["x"], batch["y"]]
    return Training(model, gradients, step, held)


def _drawn_once(recipe: Recipe, batch: Batch, seed: int) -> Recipe:
    """With the same noise in every step: the host's draws are the same on all rungs, and no part of them."""
    rng = SampleRNG(seed, batch["index"], batch["x"].device)
    noise, time = rng.normal("noise", batch["x"].shape[1:]), rng.uniform("time")
    drawn: Any = _Drawn({"noise": noise, "time": time})
    return replace(recipe, loss=lambda model, given, _: recipe.loss(model, given, drawn))


class _Drawn:
    """Gives what was drawn before, by name, as `SampleRNG` would."""

    def __init__(self, draws: dict[str, Tensor]) -> None:
        self._draws = draws

    def normal(self, name: str, _: Sequence[int] = ()) -> Tensor:
        return self._draws[name]

    uniform = normal


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights, drawn on the device: of variance 1 / (numbers in a row); a norm's are one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        local = local_part(parameter)
        if parameter.dim() == 1 and name.endswith("weight"):
            local.fill_(1)
        else:
            local.normal_(std=0.02 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)


def _draw_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before an update: what a fake group's sums leave may be old memory, NaN and all."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for gradient in (p.grad for p in parameters):
        if isinstance(gradient, DTensor):
            local_part(gradient).uniform_(-1e-3, 1e-3)
