"""A DiT-style model that knows nothing of dtrain, and the recipe that plugs it in."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.data import loader
from dtrain.recipe import Batch, DataState, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.init import fill_by_building


class Block(nn.Module):
    """Pre-norm attention and MLP, both scaled, shifted and gated by the condition (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + gate1 * self.proj(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TinyDiT(nn.Module):
    def __init__(self, features: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.time, self.head = (
            nn.Linear(i, o) for i, o in ((features, width), (1, width), (width, features))
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = F.silu(self.time(t[:, None].to(x.dtype)))
        x = self.dropout(self.embed(x))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


@dataclass(frozen=True)
class ModelTable:
    features: int = 6
    width: int = 32
    depth: int = 3
    heads: int = 2
    dropout: float = 0.0


@dataclass(frozen=True)
class TinyConfig:
    model: ModelTable = field(default_factory=ModelTable)


class Waves:
    """Sample i is a wave of frequency i mod 7: tokens 5, features 6."""

    def __getitem__(self, index: int) -> dict[str, object]:
        grid = torch.arange(30.0).view(5, 6)
        return {"x": torch.sin(grid * (1 + index % 7) / 7), "index": index}


def collate(samples: list[dict[str, object]]) -> Batch:
    return {
        "x": torch.stack([s["x"] for s in samples]),  # type: ignore[misc]
        "index": torch.tensor([s["index"] for s in samples]),
    }


def loss(model: nn.Module, batch: Batch, rng: SampleRNG) -> Tensor:
    noise, t = rng.normal("noise", batch["x"].shape[1:]), rng.uniform("time")
    noised = torch.lerp(batch["x"], noise, t[:, None, None])
    return F.mse_loss(model(noised, t), noise - batch["x"])


def recipe(config: TinyConfig) -> Recipe:
    table = config.model

    def build() -> nn.Module:
        return TinyDiT(table.features, table.width, table.depth, table.heads, table.dropout)

    def data(rank: int, world: int, state: DataState):  # type: ignore[no-untyped-def]
        return loader(Waves(), rank, world, state, workers=0, collate=collate)

    def flops(batch: Batch) -> int:
        return 2 * 5 * len(batch["index"]) * table.depth * 12 * table.width**2

    return Recipe(build=build, init=fill_by_building(build), loss=loss, data=data, flops=flops)
