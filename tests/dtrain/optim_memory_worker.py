"""Started by torchrun: bf16 weights, moments of eight bits and bf16 averages on any number of ranks.

    optim_memory_worker.py OUT CHECKPOINTS resharding|compressed|replicas

Rank 0 writes what it has come to. Parameters and gradients of `resharding`, which is done in any case, are
the same for any world: four ranks save, two load that and save it, one loads that. `replicas` trains on data
of its own on each of two copies.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dtrain.checkpoint import TrainingState
from dtrain.comm import CommConfig, attach
from dtrain.dist import process_group
from dtrain.dryrun import state_bytes
from dtrain.optim import EMA, AdamW, EMAConfig
from dtrain.sharding.init import fill_parameters
from dtrain.sharding.local import local_part
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.placement import placement
from dtrain.sharding.precision import convert_weights
from tests.checkpoints import write_state
from tests.dtrain import odd_model
from tests.dtrain.adamw_worker import drawn, gathered
from tests.dtrain.tiny_dit import TinyDiT

STEPS, HALF = 6, 3
_SCHEMES = (
    ("none", torch.bfloat16),
    ("bf16", torch.float32),
    ("int8", torch.bfloat16),
    ("int8-int4", torch.float32),
    ("int4-delta", torch.float32),
    ("int4-delta", torch.bfloat16),
)
_COMBINATIONS = itertools.product(("fp32", "bf16"), ("fp32", "8bit"), ("fp32", "bf16"))


def normal(_name: str, full: Tensor, generator: torch.Generator) -> None:
    full.normal_(generator=generator)


class Run:
    """Rows that are uneven over 2 and 4 ranks, so few that some ranks have none, and one in a table."""

    def __init__(self, mesh: DeviceMesh) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(256, 50), nn.Linear(1030, 5), nn.Linear(16, 3))
            model.table = nn.Parameter(torch.empty(1, 130, 128))  # along dim 1 on 2 ranks, 2 on 4
        model[2].bias.requires_grad_(False)
        convert_weights(model, "bf16")
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: placement(p, mesh.size()))
        self.model = model.to_empty(device="cpu")
        fill_parameters(model, normal, seed=1)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-3, weight_decay=0.1, moments="8bit", seed=5)
        self.ema = EMA(model, EMAConfig(decay=0.999, warmup=False, dtype="bf16"), seed=5)
        self.state = TrainingState(model, self.optimizer, self.ema)

    def take(self, steps: range) -> None:
        """In every other step one parameter has no gradient: its average is taken outside of the pass."""
        for step in steps:
            for number, parameter in enumerate(self.model.parameters()):
                absent = number == 0 and step % 2 == 1
                if parameter.requires_grad and not absent:
                    parameter.grad = drawn(parameter, 100 + 10 * step + number).to(parameter.dtype)
            self.optimizer.step(ema=self.ema.at(step))
            self.optimizer.zero_grad()


def resharding(mesh: DeviceMesh, checkpoints: Path) -> dict[str, Any]:
    run = Run(mesh)
    found = {"start": gathered(run.state)}
    run.take(range(HALF))
    found["half"] = gathered(run.state)
    if mesh.size() == 4:
        write_state(run.state, checkpoints / "4")
    run.take(range(HALF, STEPS))
    found["end"] = gathered(run.state)
    resumed = Run(mesh)
    resumed.state.load(checkpoints / ("2" if mesh.size() == 1 else "4"))
    found["loaded"] = gathered(resumed.state)
    if mesh.size() == 2:
        write_state(resumed.state, checkpoints / "2")
    resumed.take(range(HALF, STEPS))
    found["loaded-end"] = gathered(resumed.state)
    return found


def _nbytes(tensors: Any) -> int:
    return sum(local_part(x).numel() * x.element_size() for x in tensors)


def bytes_held(mesh: DeviceMesh) -> dict[str, tuple[int, ...]]:
    """For each combination what is planned for the first rank, then what this rank holds after a step."""
    found = {}
    for weights, moments, average in _COMBINATIONS:
        model: nn.Module = TinyDiT(features=6, width=132, depth=1, heads=2, dropout=0.0)
        model.time.weight.requires_grad_(False)
        convert_weights(model, weights)  # type: ignore[arg-type]
        planned = state_bytes(model, mesh.size(), ema=True, moments=moments, average=average)  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(trained, moments=moments)  # type: ignore[arg-type]
        ema = EMA(model, EMAConfig(dtype=average))  # type: ignore[arg-type]
        x = torch.randn(2, 5, 6, dtype=trained[0].dtype)
        model(x, torch.rand(2)).square().mean().backward()
        optimizer.step(ema=ema.at(0))
        state = [x for s in optimizer.state.values() for name, x in s.items() if name != "step"]
        held = map(_nbytes, (model.parameters(), [p.grad for p in trained], state, ema.shards.values()))
        plan = (planned.parameters, planned.gradients, planned.optimizer, planned.ema)
        found[f"{weights}-{moments}-{average}"] = (*plan, *held)
    return found


def _train(replicate: int, preset: str, dtype: torch.dtype, steps: int = 4) -> tuple[Any, AdamW, EMA]:
    """The odd model with bf16 shards, trained on this rank's own data."""
    model = odd_model.build()
    convert_weights(model, "bf16")
    mesh = build_mesh(MeshConfig(replicate=replicate), dist.get_world_size(), "cpu")
    odd_model.apply(model, mesh, dtype)
    attach(model, mesh, CommConfig(preset=preset, exact_below=0))  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-3, weight_decay=0.1, moments="8bit", seed=5)
    ema = EMA(model, EMAConfig(decay=0.99, dtype="bf16"), seed=5)
    for step in range(steps):
        odd_model.loss_of(model, odd_model.inputs(dist.get_rank(), dist.get_world_size(), step)).backward()
        optimizer.step(ema=ema.at(step))
        optimizer.zero_grad()
    return model, optimizer, ema


def replicas() -> dict[str, list[list[str]]]:
    """Digests of every rank's own part of all state, by preset."""
    found = {}
    for preset in ("none", "int8-int4"):
        model, optimizer, ema = _train(2, preset, torch.float32)
        parts = [*model.parameters(), *ema.shards.values()]
        parts += [x for state in optimizer.state.values() for x in state.values()]
        mine = [odd_model.digest(local_part(x)) for x in parts]
        found[preset] = _from_all(mine)
    return found


def compressed() -> dict[str, dict[str, Any]]:
    """What ranks compute with in the last forward, by preset and compute dtype, beside the masters."""
    found = {}
    for preset, dtype in _SCHEMES:
        model, _, _ = _train(1, preset, dtype, steps=3)
        x = odd_model.inputs(dist.get_rank(), dist.get_world_size(), 3)
        loss = odd_model.loss_of(model, x)
        loss.backward()
        shards = {name: p.detach() for name, p in model.named_parameters()}
        masters = {name: p.full_tensor() for name, p in shards.items() if isinstance(p, DTensor)}
        decoded = {name: w for name, w in model.weights.items() if name in masters}
        for i, block in enumerate(model.blocks):
            decoded |= {f"blocks.{i}.{name}": w for name, w in block.weights.items()}
        error = sum(float((decoded[n].float() - masters[n].float()).square().sum()) for n in decoded)
        size = sum(float(masters[n].float().square().sum()) for n in decoded)
        found[f"{preset}-{dtype}"] = {
            "digests": _from_all([odd_model.digest(w) for w in decoded.values()]),
            "error": (error / size) ** 0.5,
            "dtypes": {str(w.dtype) for w in decoded.values()},
            "masters": {str(w.dtype) for w in masters.values()},
            "gradients": {str(p.grad.dtype) for p in model.parameters() if p.grad is not None},
            "loss": float(loss.detach()),
        }
    return found


def _from_all(mine: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def main(out: str, checkpoints: str, mode: str) -> None:
    with process_group(60) as world:
        mesh = build_mesh(MeshConfig(), world.size, "cpu")
        results: dict[str, Any] = resharding(mesh, Path(checkpoints))
        if mode == "compressed":
            results |= {"bytes": bytes_held(mesh), "compressed": compressed()}
        if mode == "replicas":
            results["replicas"] = replicas()
        if world.is_main:
            torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
