"""One optimizer step: micro-batches, gradients averaged over ranks, and one pass that clips and updates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dtrain.optim import AdamW, Average, gradient_norm
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG, seed_everything


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch sizes and samples."""

    steps: int = field(default=500_000, metadata={"help": "Optimizer steps of the whole run."})
    global_batch: int = field(
        default=1024,
        metadata={"help": "Samples per optimizer step over all ranks, whatever their number."},
    )
    micro_batch: int = field(
        default=8,
        metadata={
            "help": "Samples per rank and forward pass; the rest of the global batch is accumulated over "
            "several passes."
        },
    )
    sample_every: int = field(
        default=0, metadata={"help": "Generate clips every this many steps and at the end; 0: never."}
    )
    samples: int = field(default=4, metadata={"help": "Clips generated each time."})
    timeout_s: float = field(
        default=600.0, metadata={"help": "Seconds that a collective waits for a missing rank."}
    )

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be 1 or more.")
        if self.sample_every < 0:
            raise ValueError(f"train.sample_every = {self.sample_every}: must be 0 or more.")

    def accumulation(self, world: int) -> int:
        """Micro-batches per rank and step; ValueError when the sizes do not divide."""
        per_pass = self.micro_batch * world
        if self.global_batch % per_pass:
            below = self.global_batch // per_pass * per_pass
            nearest = f"{below} or {below + per_pass}" if below else str(per_pass)
            raise ValueError(
                f"train.global_batch = {self.global_batch} is not a multiple of train.micro_batch x ranks = "
                f"{self.micro_batch} x {world} = {per_pass}: use {nearest}, or another micro_batch."
            )
        return self.global_batch // per_pass


class StepResult(NamedTuple):
    """What a step measured, as device tensors: reading them on the host is the caller's choice."""

    loss: Tensor
    """Mean over this rank's samples of the step, fp32 scalar."""
    grad_norm: Tensor
    """Global gradient norm before clipping, fp32 scalar."""
    losses: Tensor
    """Of this rank's micro-batches (M,), fp32."""


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

    Gradients end up averaged over micro-batches and ranks. Returns this rank's mean losses, one of each.

    Args:
        model: sharded or not.
        recipe: brings the loss.
        batches: the step's micro-batches, equally large.
        seed: the run's seed.
        device: where to compute.
        reduce_each: reduce gradients over ranks after each micro-batch, not only after the last.
    """
    losses = []
    for number, batch in enumerate(batches, start=1):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(reduce_each or number == len(batches))
        index = batch["index"]
        seed_everything(seed, "model", int(index[0]))
        loss = recipe.loss(model, to_device(batch, device), SampleRNG(seed, index, device))
        (loss / len(batches)).backward()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor | None:
    """What gradients of this norm are multiplied by, so that theirs is at most `max_norm`; 0 never clips.

    By the formula of `torch.nn.utils.clip_grad_norm_`.
    """
    return (max_norm / (norm.float() + 1e-6)).clamp(max=1.0) if max_norm > 0 else None


def train_step(
    model: nn.Module,
    recipe: Recipe,
    optimizer: AdamW,
    batches: Sequence[Batch],
    *,
    seed: int,
    device: torch.device,
    clip_norm: float = 0.0,
    reduce_each: bool = True,
    ema: Average | None = None,
    accepts: Callable[[StepResult], bool] | None = None,
) -> StepResult:
    """Take one optimizer step; see `accumulate_gradients` and `AdamW.step` for the arguments.

    Args:
        accepts: is asked before the update, which is passed over where it says no.
    """
    losses = accumulate_gradients(model, recipe, batches, seed=seed, device=device, reduce_each=reduce_each)
    norm = gradient_norm(model.parameters())
    result = StepResult(losses.mean(), norm, losses)
    if accepts is None or accepts(result):
        optimizer.step(grad_scale=clip_coefficient(norm, clip_norm), ema=ema)
    optimizer.zero_grad(set_to_none=True)
    return result
