"""Run under torchrun: compressed collectives on the streams of a GPU that all ranks share, or on the CPU.

gloo moves the bytes of CUDA tensors too, so that the real FSDP2 schedule runs with several ranks on one GPU,
where NCCL wants one each. Arguments: the file that rank 0 writes, a device, scenarios ("preset:option=1").
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dtrain.comm import CommConfig, attach
from dtrain.comm.packing import Packing
from dtrain.comm.reference import Reference
from dtrain.dist import leave_process_group
from tests.dtrain import odd_model
from tests.dtrain.odd_model import digest, inputs, loss_of

Result = dict[str, Any]
STEPS = 4
_PAUSE_CYCLES = 1_000_000  # a little under a millisecond


class Schedule(NamedTuple):
    """What is put between the kernels of a step.

    Args:
        compute: on the compute stream, before a block's kernels, forward and backward.
        collective: on the streams of collectives, around their kernels.
        poison: memory that the compute stream has freed is filled with NaN, again and again.
    """

    compute: Callable[[], None]
    collective: Callable[[], None]
    poison: bool


def schedules(device: str) -> dict[str, Schedule]:
    """`serial` waits for the device at every place; in the others one side is late, and races would show."""
    burn = Burner(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def pause() -> None:
        if device == "cuda":
            torch.cuda._sleep(_PAUSE_CYCLES)

    def nothing() -> None:
        pass

    return {
        "serial": Schedule(wait, wait, poison=False),
        "late compute": Schedule(burn, nothing, poison=True),
        "late compute, again": Schedule(burn, nothing, poison=True),
        "late collectives": Schedule(nothing, pause, poison=True),
    }


class Burner:
    """Matrix products on the current stream, not equally long on all ranks."""

    def __init__(self, device: str) -> None:
        self.calls = dist.get_rank()
        self.matrix = torch.ones([2048 if device == "cuda" else 16] * 2, device=device)

    def __call__(self) -> None:
        self.calls += 1
        for _ in range(1 + self.calls % 4):
            self.matrix @ self.matrix


def poison(device: str) -> None:
    """Fill what the allocator could give to the current stream next with bytes that stand for NaN."""
    sizes = _free_sizes() if device == "cuda" else [2**i for i in range(9, 20)]
    # All at once, or the allocator would give the same block again.
    _ = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]


def _free_sizes() -> list[int]:
    """Bytes of the blocks that the current stream has freed, cut so that each is found again in its pool."""
    stream = torch.cuda.current_stream().cuda_stream
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        most = 2**20 if segment["segment_type"] == "small" else segment["total_size"]
        blocks = segment["blocks"] if segment["stream"] == stream else []
        for size in (block["size"] for block in blocks if block["state"] == "inactive"):
            sizes += [most] * (size // most) + [size % most] * (size % most > 0)
    return sizes


@contextmanager
def disturbed(schedule: Schedule) -> Iterator[None]:
    """Call `schedule.collective` on both sides of all that codecs do."""

    def around(inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            schedule.collective()
            result = inner(*args, **kwargs)
            schedule.collective()
            return result

        return call

    places = [(Packing, "pack"), (Packing, "unpack_sum"), (Reference, "add"), (Reference, "read")]
    patches = [mock.patch.object(owner, name, around(getattr(owner, name))) for owner, name in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


class Run:
    """Steps of the odd model on a device; notes clones, so that nothing waits for the device meanwhile."""

    def __init__(
        self, device: str, schedule: Schedule, preset: Any, *, replicate: int = 1, **options: Any
    ) -> None:
        self.device, self.schedule = device, schedule
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model, mesh = odd_model.sharded(self.world, replicate, device=device)
        options = {"exact_below": 0, "exact": ("blocks.1.fc2.weight",)} | options
        self.comm = attach(self.model, mesh, CommConfig(preset=preset, **options))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.noted: dict[str, list[Tensor]] = {"losses": [], "gradients": []}
        self._prepare()

    @property
    def blocks(self) -> list[odd_model.Block]:
        return [block for block in self.model.blocks if isinstance(block, odd_model.Block)]

    def _prepare(self) -> None:
        for block, after in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            block.note = lambda weight: weight.detach().clone()
            block.fc1.register_forward_pre_hook(lambda *_: self._disturb())
            block.tamper = self._tamper
            if after is not None:
                block.set_modules_to_forward_prefetch([after])  # type: ignore[operator]

    def _disturb(self) -> None:
        self.schedule.compute()
        if self.schedule.poison:
            poison(self.device)

    def _tamper(self, gradient: Tensor) -> Tensor:
        self._disturb()
        return gradient

    def step(self, step: int) -> None:
        loss = loss_of(self.model, inputs(self.rank, self.world, step).to(self.device))
        loss.backward()
        if self.schedule.poison:
            poison(self.device)
        self.noted["losses"].append(loss.detach().clone())
        self.noted["gradients"] += [g.clone() for g in self.gradients().values()]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: p.grad.to_local()
            for name, p in self.model.named_parameters()
            if isinstance(p.grad, DTensor)
        }

    def digests(self) -> Result:
        """Of all that was noted, in order; waits for the device."""
        masters = [p.to_local() for p in self.model.parameters() if isinstance(p, DTensor)]
        seen = {
            way: [[digest(x) for x in b.seen[way]] for b in self.blocks] for way in ("forward", "backward")
        }
        return seen | {name: [digest(x) for x in values] for name, values in self.noted.items()} | {
            "masters": [digest(x) for x in masters],
            "finite": all(bool(x.isfinite().all()) for x in [*masters, *self.noted["losses"]]),
        }  # fmt: skip


def steps(device: str, preset: str, **options: Any) -> Result:
    """The digests of training by every schedule."""
    results = {}
    for name, schedule in schedules(device).items():
        with disturbed(schedule):
            run = Run(device, schedule, preset, **options)
            for step in range(STEPS):
                run.step(step)
            results[name] = run.digests()
    return results


def poisoned(device: str, preset: str) -> Result:
    """Whether freed memory that is given out again is full of NaN."""
    sizes = (600, 5000, 300_000, 5_000_000)
    for size in sizes:
        torch.zeros(size, device=device)
    poison(device)
    again = [torch.empty(size, device=device) for size in sizes]
    return {"reached": [bool(x.isnan().all()) for x in again]}


def against_cpu(device: str, preset: str, **options: Any) -> Result:
    """The first step on the device and on the CPU: weights by digest, gradients by distance."""
    (weights, gradients, _), (own, wanted, codec_error) = (
        _first_step(kind, preset, **options) for kind in (device, "cpu")
    )
    return {
        "same_weights": weights == own,
        "distance": float((gradients - wanted).norm() / wanted.norm()),
        "codec_error": codec_error,
        "same_exact": exact_gradients(device, preset, **options) == exact_gradients("cpu", preset, **options),
    }


def _first_step(kind: str, preset: str, **options: Any) -> tuple[list[str], Tensor, float]:
    """Digests of the weights, compressed gradients, and the error of their codec."""
    run = Run(kind, schedules(kind)["serial"], preset, **options)
    run.comm.meter.sample = True
    loss_of(run.model, inputs(run.rank, run.world).to(kind)).backward()
    weights = [digest(w) for block in run.blocks for w in block.weights.values()]
    gradients = [g.flatten().cpu() for name, g in run.gradients().items() if "blocks.1.fc2" not in name]
    return weights, torch.cat(gradients), run.comm.meter.read()["wire_error_reduce"]


class Dot(nn.Module):
    """Σ parameter · constant: the constants are the gradients, to the bit, on any device."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(203, 50), (31,), (50, 203), (7, 3), (129, 64)]
        self.weights = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, constants: list[Tensor]) -> Tensor:
        parts = [(w * c).sum() for w, c in zip(self.weights, constants, strict=True)]
        return torch.stack(parts).sum()


def exact_gradients(
    device: str, preset: Any, replicate: int = 1, steps: int = 3, **options: Any
) -> list[str]:
    """Digests of sums of gradients that are whole numbers, of which rotations are exact in any order.

    What a second hop encodes are fractions: there without a rotation.
    """
    options |= {"rotation": 0} if "ranks_per_node" in options else {}
    model = Dot().to(device)
    world = dist.get_world_size()
    names = ("replicate", "shard") if replicate > 1 else ("shard",)
    sizes = (replicate, world // replicate) if replicate > 1 else (world,)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
    fully_shard(model, mesh=mesh)
    attach(model, mesh, CommConfig(preset=preset, exact_below=32, **options))
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for _ in range(steps):
        constants = [torch.randint(-999, 999, p.shape, generator=generator) for p in model.parameters()]
        model([c.float().to(device) for c in constants]).backward()
        gradients = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
        found += [digest(g.to_local()) for g in gradients]
        model.zero_grad()
    return found


SCENARIOS: dict[str, Callable[..., Result]] = {
    scenario.__name__: scenario for scenario in (steps, poisoned, against_cpu)
}


def main(out: str, device: str, *scenarios: str) -> None:
    if device == "cuda":
        torch.zeros((), device="cuda:0")  # or the mesh would choose a device by the local rank
    dist.init_process_group("cpu:gloo,cuda:gloo", timeout=timedelta(seconds=200))
    results: dict[str, list[Any]] = {}
    for scenario in scenarios:
        name, preset, *texts = scenario.split(":")
        options = {key: int(value) for key, value in (text.split("=") for text in texts)}
        call = SCENARIOS[name]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, call(device, preset, **options))
        results[scenario] = everyone
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # products repeat their bits beside other streams
    main(*sys.argv[1:])
