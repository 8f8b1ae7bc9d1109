"""The training whose state is saved, and its tensors as they lie in this rank's memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

import uvit
from benchmarks.saving.job import Workload
from dtrain.checkpoint import TrainingState
from dtrain.dist import World
from dtrain.optim import OptimConfig, build_optimizer
from dtrain.optim.ema import EMA, EMAConfig
from dtrain.parallelize import parallelize
from dtrain.sharding.init import fill_parameters
from dtrain.sharding.mesh import MeshConfig, build_mesh

__all__ = ["Training", "bytes_that_differ", "copied", "spoil", "whole_bytes"]


class Training:
    """A sharded U-ViT with AdamW and averages, all of its state there.

    Attributes:
        state: what a checkpoint holds.
        parameters: of the model.
    """

    def __init__(self, workload: Workload, world: World) -> None:
        with torch.device("meta"):
            model = uvit.build(workload.config)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = parallelize(model, build_mesh(MeshConfig(), world.size, "cpu")).to_empty(device="cpu")
        fill_parameters(self.model, uvit.initializer(self.model), seed=0)
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.optimizer.make_state()
        self.ema = EMA(self.model, EMAConfig())
        self.state = TrainingState(self.model, self.optimizer, self.ema)
        self._batch = _batch(workload, world.rank)
        self._steps = 0

    def step(self) -> None:
        """Forward, backward, AdamW and averages; changes every tensor of the state."""
        noisy, timesteps, target = self._batch
        F.mse_loss(self.model(noisy, timesteps).float(), target).backward()
        self.optimizer.step(ema=self.ema.at(self._steps))
        self.optimizer.zero_grad()
        self._steps += 1


def _batch(workload: Workload, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed noise to be turned into fixed noise: no data is read."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (workload.batch, 4, 8, 8)
    noisy, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return noisy, torch.arange(workload.batch) * 100.0 + rank, target


def _parts(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """This rank's part of every tensor, by name."""
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield prefix + name, value.to_local() if isinstance(value, DTensor) else value
        else:
            yield from _parts(value, f"{prefix}{name}.")


@torch.no_grad()
def copied(state: TrainingState, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A copy of this rank's part of the state, in memory that is there or in fresh one."""
    parts = dict(_parts(state.tensors()))
    kept = dict(into) if into else {name: torch.empty_like(part) for name, part in parts.items()}
    for name, part in parts.items():
        kept[name].copy_(part)
    return kept


@torch.no_grad()
def spoil(state: TrainingState) -> None:
    """Make every number of the state NaN, so that only a load can bring one back."""
    for _, part in _parts(state.tensors()):
        part.fill_(torch.nan)


def bytes_that_differ(state: TrainingState, kept: Mapping[str, Tensor]) -> int:
    """Of all ranks; a tensor that is missing or has another shape or dtype differs as a whole."""
    parts = dict(_parts(state.tensors()))
    count = sum(_differ(parts.get(name), kept.get(name)) for name in parts.keys() | kept.keys())
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def _differ(a: Tensor | None, b: Tensor | None) -> int:
    if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return max(t.nbytes for t in (a, b) if t is not None)
    return int(torch.count_nonzero(_raw(a) != _raw(b)))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def whole_bytes(state: TrainingState) -> int:
    """Of the whole tensors, each once: the least that a checkpoint can take uncompressed."""

    def count(tree: Mapping[str, Any]) -> int:
        values = tree.values()
        return sum(v.numel() * v.element_size() if isinstance(v, Tensor) else count(v) for v in values)

    return count(state.tensors())
