"""The baselines, in plain PyTorch: DDP under autocast and FSDP2 in bf16, with and without checkpointing.

They are the best of their kind, not the worst: flash attention; DDP's gradients are views of its buckets; in
FSDP2 the table of positions is cut along a dim that the ranks divide (`dtrain.sharding.placement`), without
which it would be gathered once a rank; AdamW is PyTorch's fused one, which takes no memory of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.ladder.rungs import Rung
from dtrain.blocks import named_blocks
from dtrain.plan.accounts import AVERAGES, BATCH, GRADIENTS, OPTIMIZER, PARAMETERS
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Subject
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.placement import placement

__all__ = ["baseline"]


def baseline(
    recipe: Recipe,
    rung: Rung,
    batch: Batch,
    mesh: DeviceMesh,
    ledger: Ledger | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Subject:
    """A rung in plain PyTorch, its parameters not filled under FSDP2.

    Args:
        recipe: of the plain model.
        rung: one with the base "ddp" or "fsdp2".
        batch: of the step, where the model will be.
        mesh: one axis, over all ranks.
        ledger: that watches, if any does: DDP's buckets are there before the first step.
        dtype: of compute.
    """
    if rung.base == "ddp":
        return _ddp(recipe, batch, rung.checkpointing, dtype, ledger)
    return _fsdp2(recipe, batch, rung.checkpointing, dtype, mesh)


def _ddp(
    recipe: Recipe, batch: Batch, checkpointing: bool, dtype: torch.dtype, ledger: Ledger | None
) -> Subject:
    """Replicated fp32 parameters, computed in bf16 by autocast: the recipe of U-ViT's authors."""
    device = batch["x"].device
    with device:
        model = recipe.build()
    blocks = _blocks(model, checkpointing)
    with _noted(ledger):
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    replica.register_comm_hook(None, _sum)

    def gradients() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = recipe.loss(replica, batch, _rng(batch))
        loss.backward()
        return loss.detach()

    # A second step would sort the buckets anew, of the same sizes, by numbers that are not there.
    return _subject(replica, blocks, gradients, batch, settles=False)


@contextmanager
def _noted(ledger: Ledger | None) -> Iterator[None]:
    if ledger is None:
        yield
        return
    with ledger.scope(GRADIENTS), ledger:
        yield


def _fsdp2(
    recipe: Recipe, batch: Batch, checkpointing: bool, dtype: torch.dtype, mesh: DeviceMesh
) -> Subject:
    """Parameters, gradients and state cut among the ranks; gathered and computed in bf16, reduced in fp32."""
    with torch.device("meta"):
        model = recipe.build()
    blocks = _blocks(model, checkpointing)
    common: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": partial(placement, ranks=mesh.size())}
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks.values():
        fully_shard(block, mp_policy=mixed, **common)
    # FSDP2 would cast the timesteps too, of which bf16 keeps eight bits: 999 would be 1000.
    fully_shard(model, mp_policy=replace(mixed, cast_forward_inputs=False), **common)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    model.to_empty(device=batch["x"].device)

    def gradients() -> Tensor:
        loss = recipe.loss(model, batch, _rng(batch))
        loss.backward()
        return loss.detach()

    return _subject(model, blocks, gradients, batch, settles=True)


def _blocks(model: nn.Module, checkpointing: bool) -> dict[str, nn.Module]:
    blocks = named_blocks(model)
    if checkpointing:
        for block in blocks.values():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return blocks


def _subject(
    model: nn.Module, blocks: dict[str, nn.Module], gradients: Any, batch: Batch, settles: bool
) -> Subject:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    state: dict[str, Iterable[Tensor]] = {
        PARAMETERS: [*model.parameters(), *model.buffers()],
        OPTIMIZER: [x for kept in optimizer.state.values() for x in kept.values()],
        AVERAGES: [p.detach().clone() for p in trained],
        BATCH: [x for x in batch.values() if isinstance(x, Tensor)],
    }
    return Subject(model, blocks, gradients, optimizer, state, settles=settles)


def _rng(batch: Batch) -> SampleRNG:
    index: Sequence[int] = batch["index"]
    return SampleRNG(0, index, batch["x"].device)


def _sum(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does by itself; but a process group of one rank alone gives no result to wait for."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer)
    devices: list[int | str | torch.device] = [buffer.device] if buffer.is_cuda else []  # streams that wait
    summed: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    summed.set_result(buffer)
    return summed
