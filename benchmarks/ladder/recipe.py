"""What every rung trains: a model on random latents, written plainly or with dtrain's layers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import uvit
from benchmarks.baselines.plain_dit import PlainDiT
from benchmarks.baselines.plain_uvit import PlainUViT, PlainVideoUViT
from dtrain.data import micro_batch_indices
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.init import fill_by_building
from uvit import UViTConfig

__all__ = ["LatentsConfig", "first_batch", "latents"]


@dataclass(frozen=True)
class LatentsConfig:
    """The tables of `benchmarks.ladder.recipe:latents`."""

    model: UViTConfig = field(default_factory=UViTConfig)
    body: Literal["uvit", "plain", "dit"] = field(
        default="uvit", metadata={"help": "ours; the same written plainly; a plain DiT of that size"}
    )


def latents(config: LatentsConfig) -> Recipe:
    """A class-conditional model of the velocity between random latents and noise."""
    model = config.model
    frames, height, width = model.input_size
    shape = (model.in_channels, height, width) if frames == 1 else (model.in_channels, *model.input_size)

    def build() -> nn.Module:
        return _build(config)

    def data(rank: int, world: int, state: DataState) -> Iterator[Batch]:
        for index in micro_batch_indices(rank, world, state):
            numbers = torch.tensor(index)
            rng = SampleRNG(state.seed, numbers)
            yield {
                "x": rng.normal("latents", shape),
                "y": numbers % model.num_classes,
                "index": numbers,
            }

    def flops(batch: Batch) -> int:
        return uvit.forward_flops(model, len(batch["index"]), *model.input_size)

    return Recipe(build=build, init=fill_by_building(build), loss=_loss, data=data, flops=flops)


def first_batch(recipe: Recipe, samples: int) -> Batch:
    """What rank 0 reads first, on the CPU."""
    return next(iter(recipe.data(0, 1, DataState(0, 0, samples))))


def _build(config: LatentsConfig) -> nn.Module:
    c = config.model
    if config.body == "uvit":
        return uvit.UViT(c)
    side, patch = c.input_size[-1], c.patch_size[-1]
    if config.body == "dit":
        return PlainDiT(side, patch, c.in_channels, c.width, c.depth, c.heads, c.num_classes)
    if c.input_size[0] == 1:
        body = (c.in_channels, c.width, c.depth, c.heads, c.num_classes, c.final_conv)
        return PlainUViT(side, patch, *body)
    sizes = (c.in_channels, c.width, c.depth, c.heads, c.num_classes)
    return PlainVideoUViT(c.input_size, c.patch_size, *sizes)


def _loss(model: nn.Module, batch: Batch, rng: SampleRNG) -> Tensor:
    x: Tensor = batch["x"]
    noise, time = rng.normal("noise", x.shape[1:]), rng.uniform("time")
    noised = torch.lerp(x, noise, time.view(-1, *[1] * (x.dim() - 1)))
    predicted = model(noised, 1000 * time, batch["y"])
    return F.mse_loss(predicted.float(), noise - x)
