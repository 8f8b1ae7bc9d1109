"""Run under torchrun: state on the host (`shard.cpu_offload`) beside state on the device, on one GPU.

Arguments: the file that rank 0 writes, a folder for checkpoints, a device, presets. gloo moves the bytes of
CUDA tensors too, so that several ranks may share a GPU. Where the device is the CPU both runs are the same.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.checkpoint import CheckpointConfig, Checkpointer, Progress, TrainingState
from dtrain.comm import CommConfig
from dtrain.comm.fsdp import find_units
from dtrain.dist import leave_process_group
from dtrain.optim import EMA, EMAConfig, OptimConfig, build_optimizer, gradient_norm
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.sharding.init import fill_parameters
from dtrain.sharding.local import local_part
from dtrain.sharding.mesh import MeshConfig, build_mesh
from dtrain.sharding.precision import Precision, convert_weights
from dtrain.sharding.shard import ShardConfig, to_empty
from tests.dtrain.tiny_dit import TinyDiT

STEPS = 3


class WithBuffer(TinyDiT):
    """A buffer must be where compute is."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__(features=6, width=132, depth=2, heads=2, dropout=0.0)
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + self.offset, t) + 0.0


def fill(_name: str, full: Tensor, generator: torch.Generator) -> None:
    full.normal_(std=0.1, generator=generator)


class Run:
    def __init__(self, device: torch.device, preset: str, offload: bool, weights: Precision) -> None:
        self.device = device
        with torch.device("meta"):
            self.model: nn.Module = WithBuffer()
        convert_weights(self.model, weights)
        shard = ShardConfig(param_dtype="float32", cpu_offload=offload)
        comm = CommConfig(preset=preset, exact_below=0)  # type: ignore[arg-type]
        mesh = build_mesh(MeshConfig(), dist.get_world_size(), device.type)
        parallelize(self.model, mesh, ParallelConfig(shard=shard, comm=comm))
        to_empty(self.model, shard, device)
        fill_parameters(self.model, fill, seed=1)
        for buffer in self.model.buffers():
            buffer.fill_(0.5)
        less = weights == "bf16"
        config = OptimConfig(lr=1e-3, warmup_steps=0, moments="8bit" if less else "fp32", weights=weights)
        self.optimizer = build_optimizer(self.model, config, seed=5)
        self.ema = EMA(self.model, EMAConfig(decay=0.9, dtype=weights), seed=5)
        self.state = TrainingState(self.model, self.optimizer, self.ema)
        self.norms: list[float] = []
        self.places: set[str] = set()

    def step(self, number: int) -> None:
        loss = self.forward(number).square().mean()
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.places = {grad.device.type for grad in grads}
        self.norms.append(float(gradient_norm(self.model.parameters())))
        self.optimizer.step(grad_scale=torch.tensor(0.5, device=self.device), ema=self.ema.at(number))
        self.optimizer.zero_grad()

    def forward(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * dist.get_rank() + number)
        x, t = torch.randn(4, 5, 6, generator=generator), torch.rand(4, generator=generator)
        out: Tensor = self.model(x.to(self.device), t.to(self.device))
        return out

    def evaluated(self) -> Tensor:
        with torch.no_grad(), self.ema.swapped_into(self.model):
            return self.forward(99).cpu()

    def weights(self) -> dict[str, Tensor]:
        tree = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tree |= {f"ema.{name}": x for name, x in self.ema.shards.items()}
        return {name: x.full_tensor().cpu() if isinstance(x, DTensor) else x for name, x in tree.items()}

    def pinned(self) -> bool:
        """Whether shards are in pinned memory, the same that FSDP2 copies to the device."""
        units = find_units(self.model)
        shards = [p for unit in units for p in unit._group.fsdp_params]
        return all(
            p._sharded_param_data.is_pinned()
            and p._sharded_param_data.data_ptr() == local_part(p.sharded_param).data_ptr()
            for p in shards
            if local_part(p.sharded_param).numel()
        )


def _held(run: Run) -> int:
    """Bytes of parameters, moments and averages on the GPU."""
    state = [x for s in run.optimizer.state.values() for name, x in s.items() if name != "step"]
    tensors = [local_part(x) for x in (*run.model.parameters(), *state, *run.ema.shards.values())]
    return sum(x.nbytes for x in tensors if x.device.type == "cuda")


def result(run: Run) -> dict[str, Any]:
    for number in range(STEPS):
        run.step(number)
    before = run.weights()
    out = run.evaluated()
    after = run.weights()
    return {
        "weights": after,
        "same_after_evaluation": all(after[name].equal(x) for name, x in before.items()),
        "evaluated": out,
        "norms": run.norms,
        "places": run.places,
        "held": _held(run),
        "buffers": {b.device.type for b in run.model.buffers()},
        "pinned": run.pinned(),
        "sharded": isinstance(run.model, FSDPModule),
    }


def through_disk(run: Run, other: Run, folder: Path) -> bool:
    """Whether what one run saves is what the other loads."""
    group = dist.new_group(backend="gloo")
    saver = Checkpointer(folder, CheckpointConfig(), group, dist.get_rank() == 0)
    saver.save(run.state, Progress(STEPS, 0, 0, dist.get_world_size(), ""))
    expected = run.weights()
    run.step(STEPS)  # while it is written
    saver.wait()
    dist.barrier()
    other.state.load(folder / f"step-{STEPS:08d}")
    loaded = other.weights()
    other.step(STEPS)
    goes_on = all(other.weights()[name].equal(x) for name, x in run.weights().items())
    return goes_on and all(loaded[name].equal(x) for name, x in expected.items())


def main(out: str, folder: str, device: str, *presets: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    found: dict[str, Any] = {}
    for preset in presets:
        kinds: tuple[Precision, ...] = ("fp32", "bf16")
        for weights in kinds:
            runs = [Run(place, preset, offload, weights) for offload in (False, True)]
            found[f"{preset}-{weights}"] = [result(run) for run in runs]
            if preset == "none" and weights == "bf16":
                on_device, offloaded = runs
                twins = [Run(place, preset, offload, weights) for offload in (True, False)]
                found["to host"] = through_disk(on_device, twins[0], Path(folder, "a"))
                found["to device"] = through_disk(offloaded, twins[1], Path(folder, "b"))
    if dist.get_rank() == 0:
        torch.save(found, out)
    leave_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    main(*sys.argv[1:])
