"""Run under torchrun: what real ranks hold in a training step, by the allocator's own events.

Arguments: the file that rank 0 writes, a run's config, then sets of overrides, those of a set joined by ";".
"""

import itertools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.memory import peak_bytes
from dtrain.build import build_sharded
from dtrain.comm import attached
from dtrain.config import RunConfig, build_recipe, load
from dtrain.dist import World, process_group
from dtrain.optim import EMA, AdamW, build_optimizer
from dtrain.plan.ledger import Ledger
from dtrain.plan.watch import watched
from dtrain.recipe import DataState
from dtrain.sharding.mesh import build_mesh
from dtrain.sharding.shard import to_empty
from dtrain.step import accumulate_gradients, train_step


def measured(config: RunConfig, world: World) -> dict[str, Any]:
    """Bytes of rank 0: what lies there between steps, and the peak of forward and backward.

    By the allocator's events in a single process alone: threads of gloo free late, unseen by them.
    """
    recipe = build_recipe(config)
    model = build_sharded(recipe, config, build_mesh(config.mesh, world.size, "cpu"))
    to_empty(model, config.shard, world.device)
    recipe.init(model)
    optimizer = build_optimizer(model, config.optim, config.seed)
    ema = EMA(model, config.ema)
    stream = iter(recipe.data(world.rank, world.size, DataState(0, 0, config.train.micro_batch)))
    batches = [next(stream) for _ in range(config.train.accumulation(world.size))]
    step: dict[str, Any] = {"seed": 0, "device": world.device, "reduce_each": True}
    for number in range(2):
        train_step(model, recipe, optimizer, batches, ema=ema.at(number), **step)
    backward = partial(accumulate_gradients, model, recipe, batches, **step)
    states = [x for state in optimizer.state.values() for x in state.values()]
    inputs = [x for batch in batches for key, x in batch.items() if isinstance(x, Tensor) and key != "index"]
    tensors = [*model.parameters(), *model.buffers(), *states, *ema.shards.values(), *inputs]
    comm = attached(model)
    held = _bytes(tensors) + (comm.state.nbytes if comm else 0)
    found = {"held": held} | ({"peak": held + peak_bytes(backward)} if world.size == 1 else {})
    return found | {"by_operators": operators_peak(backward, optimizer, tensors, world)}


def operators_peak(backward: Callable[[], object], optimizer: AdamW, held: list[Tensor], world: World) -> int:
    """The peak as operators tell of it: without what they allocate inside, whoever frees it."""
    optimizer.zero_grad()
    ledger = Ledger()
    for tensor in held:
        ledger.assign(tensor, "held")
    with ExitStack() as watch:
        if world.is_main:  # the others only keep step
            watch.enter_context(watched(ledger))
            watch.enter_context(ledger)
        backward()  # what stays from step to step is seen now
        optimizer.zero_grad()
        optimizer.step()  # of nothing: weights count as changed
        begin, live = len(ledger.events), ledger.live
        backward()
    return max(itertools.accumulate((event.delta for event in ledger.events[begin:]), initial=live))


def _bytes(tensors: list[Tensor]) -> int:
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in local}.values())


def main(out: str, path: str, *sets: str) -> None:
    torch.set_num_threads(1)
    with process_group(200) as world:
        found = {each: measured(load(path, each.split(";")), world) for each in sets}
        if world.is_main:
            with open(out, "w") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
