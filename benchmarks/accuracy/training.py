"""One training: a seed of a variant, on every rank."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.accuracy.clips import Clips, training_batches
from benchmarks.accuracy.held_out import HeldOut
from benchmarks.accuracy.replicas import decoded_weights, equal_on_all_ranks, relative_error
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import Curve, Run
from benchmarks.accuracy.variants import Variant
from dtrain.activations.policy import ActivationConfig, apply_activation_policy, stash_meter
from dtrain.blocks import find_blocks
from dtrain.comm import Comm, attach
from dtrain.optim import EMA, build_optimizer, set_learning_rate
from dtrain.recipe import Batch, Recipe
from dtrain.rng import seed_everything
from dtrain.sharding.precision import convert_weights
from dtrain.step import accumulate_gradients

__all__ = ["Scene", "train"]

_TRAINING_POINTS = 100
_CPU = torch.device("cpu")
_FP32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)


@dataclass(frozen=True)
class Scene:
    """What the trainings of a process share."""

    settings: Settings
    recipe: Recipe
    clips: Clips
    held_out: HeldOut
    mesh: DeviceMesh


class _Model(NamedTuple):
    module: nn.Module
    comm: Comm

    @property
    def masters(self) -> Mapping[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}


def train(scene: Scene, variant: Variant, seed: int) -> Run:
    """Train, look at the held-out set, check ranks; every rank calls it and gets the same result."""
    settings = scene.settings
    model = _build(scene, variant, seed)
    optimisation = _Optimisation(scene, variant, model.module, seed)
    points, held_out, busy_s = _points(settings.steps, settings.points), [], 0.0
    for step in range(settings.steps):
        begin = time.perf_counter()
        optimisation.step()
        busy_s += time.perf_counter() - begin
        if step + 1 in points:
            held_out.append(_finite(scene.held_out.loss(model.masters, parts=1)))
    wire = model.comm.meter.read(settings.steps)
    _check_stash(model.module, variant)
    losses = optimisation.losses()
    loss, ema_loss = (_finite(scene.held_out.loss(s)) for s in (model.masters, optimisation.ema.shards))
    decoded = decoded_weights(model.module, scene.recipe, optimisation.next_batch(), seed)
    return Run(
        seed=seed,
        loss=loss,
        ema_loss=ema_loss,
        training=_thinned(losses),
        held_out=Curve(points, tuple(held_out)),
        replicas_equal=equal_on_all_ranks(decoded),
        repeats=_repeats(scene, variant, seed, losses),
        weight_error=relative_error(decoded, model.module),
        wire_mib=wire["wire_mib"],
        wire_ratio=wire["wire_ratio"],
        uncompressed=int(wire["wire_uncompressed"]),
        non_finite=int(wire["wire_non_finite"]),
        step_ms=1e3 * busy_s / settings.steps,
    )


def _check_stash(module: nn.Module, variant: Variant) -> None:
    meter = stash_meter(module)
    if meter is not None and not meter.read(1)["stash_mib"]:
        raise ValueError(
            f"activations.stash = {variant.activations.stash!r}: no input of a block was put away"
        )


def _build(scene: Scene, variant: Variant, seed: int) -> _Model:
    with torch.device("meta"):
        module = scene.recipe.build()
    convert_weights(module, variant.weights)
    if variant.activations != ActivationConfig():
        apply_activation_policy(find_blocks(module), variant.activations)
    fully_shard(module, mesh=scene.mesh, reshard_after_forward=True, mp_policy=_FP32)
    comm = attach(module, scene.mesh, variant.comm)
    module.to_empty(device="cpu")
    seed_everything(seed, "init")
    scene.recipe.init(module)
    return _Model(module, comm)


class _Optimisation:
    """Steps of a model, counted."""

    def __init__(self, scene: Scene, variant: Variant, module: nn.Module, seed: int) -> None:
        self._scene, self._module, self._seed = scene, module, seed
        self._batches = training_batches(scene.clips, scene.settings, seed, scene.mesh.get_rank())
        self._optim = variant.optim(scene.settings.optim)
        self._optimizer = build_optimizer(module, self._optim, seed)
        self._losses: list[Tensor] = []
        self.ema = EMA(module, variant.ema(scene.settings.average), seed)

    def next_batch(self) -> Batch:
        """This rank's next samples."""
        return next(self._batches)

    def step(self) -> None:
        """Forward, backward, update. No gradient norm: it would take a collective of its own."""
        step, settings = len(self._losses), self._scene.settings
        set_learning_rate(self._optimizer, self._optim, step, settings.steps)
        losses = accumulate_gradients(
            self._module,
            self._scene.recipe,
            [self.next_batch()],
            seed=self._seed,
            device=_CPU,
            reduce_each=True,
        )
        self._optimizer.step(ema=self.ema.at(step))
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(losses.mean())

    def losses(self) -> Tensor:
        """Of each step and rank, (steps, ranks).

        Not summed over ranks on the way: an all-reduce adds in an order that depends on how many there are.
        """
        mine = torch.stack(self._losses)
        everybody = mine.new_empty(self._scene.mesh.size() * len(mine))
        dist.all_gather_into_tensor(everybody, mine)
        return everybody.view(-1, len(mine)).T.contiguous()


def _repeats(scene: Scene, variant: Variant, seed: int, losses: Tensor) -> bool | None:
    """Whether the first losses of a second training have the same bits; tried with the first seed."""
    count = scene.settings.repeat
    if not count or seed != scene.settings.seeds[0]:
        return None
    again = _Optimisation(scene, variant, _build(scene, variant, seed).module, seed)
    for _ in range(count):
        again.step()
    return torch.equal(again.losses(), losses[:count])


def _points(steps: int, count: int) -> tuple[int, ...]:
    """At most `count` numbers of steps done, evenly apart, the last one included."""
    return tuple(sorted({math.ceil(steps * (i + 1) / count) for i in range(count)}))


def _thinned(losses: Tensor) -> Curve:
    """Means between points, of losses (steps, …)."""
    stops = _points(len(losses), _TRAINING_POINTS)
    starts = (0, *stops[:-1])
    return Curve(stops, tuple(_finite(losses[a:b].mean()) for a, b in zip(starts, stops, strict=True)))


def _finite(loss: float | Tensor) -> float | None:
    value = float(loss)
    return value if math.isfinite(value) else None
