"""Started by torchrun: the optimizer on any number of ranks; rank 0 writes what it has come to, gathered.

    adamw_worker.py OUT CHECKPOINT save|load [replicate ...]

Parameters and gradients are the same for any world. `save` writes a checkpoint half way; `load` starts once
more from the one that is there.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dtrain.checkpoint import TrainingState
from dtrain.dist import process_group
from dtrain.optim import EMA, AdamW, EMAConfig
from dtrain.sharding.mesh import MeshConfig, build_mesh
from tests.checkpoints import write_state

STEPS, HALF = 6, 3


def build(mesh: DeviceMesh) -> tuple[nn.Module, AdamW, EMA]:
    """Codes for both weights: rows that are uneven over 2 and 3 ranks, and so few that a third has none."""
    model = nn.Sequential(nn.Linear(256, 50), nn.Linear(1030, 4))
    fully_shard(model, mesh=mesh)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.copy_(drawn(parameter, number))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, moments="8bit", seed=5)
    return model, optimizer, EMA(model, EMAConfig(decay=0.9, warmup=False))


def drawn(parameter: Tensor, seed: int) -> Tensor:
    full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    assert isinstance(parameter, DTensor)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements)


def take(model: nn.Module, optimizer: AdamW, ema: EMA, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = drawn(parameter, 100 + 10 * step + number)
        optimizer.step(ema=ema.at(step))
        optimizer.zero_grad()


def gathered(state: TrainingState) -> dict[str, Tensor]:
    """All tensors of a state, whole, by name."""
    flat: dict[str, Tensor] = {}

    def collect(prefix: str, tree: dict[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                collect(f"{prefix}{key}.", value)
            else:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                flat[prefix + key] = whole.clone()

    collect("", state.tensors())
    return flat


def main(out: str, checkpoint: str, mode: str, *replicates: str) -> None:
    results = {}
    with process_group(60) as world:
        for replicate in map(int, replicates or ("1",)):
            mesh = build_mesh(MeshConfig(replicate=replicate), world.size, "cpu")
            model, optimizer, ema = build(mesh)
            state = TrainingState(model, optimizer, ema)
            take(model, optimizer, ema, range(HALF))
            results[f"half-{replicate}"] = gathered(state)
            if mode == "save" and replicate == 1:
                write_state(state, Path(checkpoint))
            take(model, optimizer, ema, range(HALF, STEPS))
            results[f"end-{replicate}"] = gathered(state)
        if mode == "load":
            model, optimizer, ema = build(mesh)
            state = TrainingState(model, optimizer, ema)
            state.load(Path(checkpoint))
            results["loaded"] = gathered(state)
            take(model, optimizer, ema, range(HALF, STEPS))
            results["loaded-end"] = gathered(state)
        if world.is_main:
            torch.save(results, out)
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
