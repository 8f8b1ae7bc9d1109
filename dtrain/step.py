"""One optimizer step: micro-batches, gradients averaged over ranks, clipping, update."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG, seed_everything


class StepResult(NamedTuple):
    """What a step measured, as device tensors: reading them on the host is the caller's choice."""

    loss: Tensor
    """Mean over this rank's samples of the step, fp32 scalar."""
    grad_norm: Tensor
    """Global gradient norm before clipping, fp32 scalar."""


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors, asynchronously where the source is pinned."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def accumulate_gradients(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    seed: int,
    device: torch.device,
    reduce_each: bool,
) -> Tensor:
    """Forward and backward over the micro-batches of one step.

    Gradients end up averaged over micro-batches and ranks. Returns this rank's mean loss.

    Args:
        model: sharded or not.
        recipe: brings the loss.
        batches: the step's micro-batches, equally large.
        seed: the run's seed.
        device: where to compute.
        reduce_each: reduce gradients over ranks after each micro-batch, not only after the last.
    """
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(reduce_each or number == len(batches))
        index = batch["index"]
        seed_everything(seed, "model", int(index[0]))
        loss = recipe.loss(model, to_device(batch, device), SampleRNG(seed, index, device)) / len(batches)
        loss.backward()
        total += loss.detach()
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Measure the global gradient norm and, when `max_norm` > 0, clip to it. Returns the norm."""
    with_grad = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm, foreach=True)
    return norm


def train_step(
    model: nn.Module,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    seed: int,
    device: torch.device,
    clip_norm: float = 0.0,
    reduce_each: bool = True,
) -> StepResult:
    """Take one optimizer step; see `accumulate_gradients` for the arguments."""
    loss = accumulate_gradients(model, recipe, batches, seed=seed, device=device, reduce_each=reduce_each)
    norm = clip_gradients(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm)
