"""The baselines, in plain PyTorch: DDP under autocast and FSDP2 in bf16, with and without checkpointing.

They are the best of their kind, not the worst: flash attention; DDP's gradients are views of its buckets; in
FSDP2 the table of positions is cut along a dim that the ranks divide (`dtrain.placement`), without which it
would be gathered once a rank; AdamW is PyTorch's fused one, which takes no memory of its own.
"""

from collections.abc import Iterable, Sequence
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

from dtrain.blocks import named_blocks
from dtrain.placement import placement
from dtrain.plan.accounts import AVERAGES, BATCH, GRADIENTS, OPTIMIZER, PARAMETERS
from dtrain.plan.ledger import Ledger
from dtrain.plan.observe import Subject
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG

__all__ = ["ddp", "fsdp2"]


def ddp(recipe: Recipe, batch: Batch, checkpointing: bool, ledger: Ledger) -> Subject:
    """Replicated fp32 parameters, computed in bf16 by autocast: the recipe of U-ViT's authors.

    Args:
        recipe: of the plain model.
        batch: of the step, where the model is.
        checkpointing: of every block.
        ledger: that watches; the buckets are there before the first step.
    """
    model = recipe.build()
    blocks = _blocks(model, checkpointing)
    with ledger.scope(GRADIENTS), ledger:
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
    replica.register_comm_hook(None, _sum)

    def gradients() -> None:
        with torch.autocast(batch["x"].device.type, torch.bfloat16):
            loss = recipe.loss(replica, batch, _rng(batch))
        loss.backward()

    # A second step would sort the buckets anew, of the same sizes, by numbers that are not there.
    return _subject(replica, blocks, gradients, batch, settles=False)


def fsdp2(recipe: Recipe, batch: Batch, checkpointing: bool, mesh: DeviceMesh) -> Subject:
    """Parameters, gradients and state cut among the ranks; gathered and computed in bf16, reduced in fp32."""
    model = recipe.build()
    blocks = _blocks(model, checkpointing)
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "shard_placement_fn": partial(placement, ranks=mesh.size()),
    }
    for block in blocks.values():
        fully_shard(block, **common)
    fully_shard(model, **common)

    def gradients() -> None:
        recipe.loss(model, batch, _rng(batch)).backward()

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
    summed: torch.futures.Future[Tensor] = torch.futures.Future()
    summed.set_result(buffer)
    return summed
