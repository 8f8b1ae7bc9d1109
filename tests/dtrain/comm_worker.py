"""Run under torchrun: compressed collectives on real ranks; writes what each measured, by rank.

Arguments: the file that rank 0 writes, a folder for checkpoints, scenarios ("name:preset:option=1").
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dtrain.checkpoint import TrainingState
from dtrain.comm import Comm, CommConfig, attach
from dtrain.dist import process_group
from dtrain.optim import EMA, EMAConfig, OptimConfig, build_optimizer, gradient_norm
from tests.checkpoints import write_state
from tests.dtrain import odd_model
from tests.dtrain.odd_model import digest, inputs, loss_of

Result = dict[str, Any]


class Run:
    """A sharded model with compressed collectives, its optimizer, and steps on its own data."""

    def __init__(self, preset: str, *, replicate: int = 1, reshard: Any = True, **options: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model, mesh = odd_model.sharded(self.world, replicate, reshard=reshard)
        options = {"exact_below": 0, "exact": ("blocks.1.fc2.weight",)} | options
        self.comm: Comm = attach(self.model, mesh, CommConfig(preset=preset, **options))  # type: ignore[arg-type]
        self.comm.meter.sample = True
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3, warmup_steps=0))
        self.ema = EMA(self.model, EMAConfig(decay=0.9))

    def backward(self, step: int = 0, scale: float = 1.0) -> Tensor:
        loss = loss_of(self.model, inputs(self.rank, self.world, step))
        (scale * loss).backward()
        return loss.detach()

    def step(self, step: int) -> float:
        loss = self.backward(step)
        self.optimizer.step(ema=self.ema.at(step))
        self.optimizer.zero_grad()
        dist.all_reduce(loss)
        return float(loss) / self.world

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: p.grad.full_tensor()
            for name, p in self.model.named_parameters()
            if isinstance(p.grad, DTensor)
        }

    def weights(self) -> dict[str, Tensor]:
        return {name: p.full_tensor() for name, p in self.model.named_parameters() if isinstance(p, DTensor)}

    def state(self) -> TrainingState:
        return TrainingState(self.model, self.optimizer, self.ema, self.comm.state)


def _reference_gradients(run: Run) -> dict[str, Tensor]:
    """Of an unsharded model with the weights that the blocks computed with, on the batch of all ranks."""
    model = odd_model.build()
    model.load_state_dict(run.model.weights, strict=False)
    for block, other in zip(model.blocks, run.model.blocks, strict=True):
        assert isinstance(block, odd_model.Block)
        assert isinstance(other, odd_model.Block)
        block.load_state_dict(other.weights)
    loss_of(model, inputs(0, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], only: Callable[[str], bool]) -> float:
    names = [name for name in b if only(name)]
    error = sum(float((a[name] - b[name]).square().sum()) for name in names)
    return (error / sum(float(b[name].square().sum()) for name in names)) ** 0.5


def gradients(preset: str, **options: Any) -> Result:
    run = Run(preset, **options)
    run.backward()
    mine, reference = run.gradients(), _reference_gradients(run)
    exact = "blocks.1.fc2.weight"
    return {
        "same_names": sorted(mine) == sorted(reference),
        "names": sorted(mine),
        "compressed": _distance(mine, reference, lambda name: "blocks" in name and name != exact),
        "exact": _distance(mine, reference, lambda name: name == exact),
        "table": _distance(mine, reference, lambda name: name == "table"),
        "norm": float(gradient_norm(run.model.parameters())),
        "norm_of_whole": float(torch.stack([g.norm() for g in mine.values()]).norm()),
    }


def weights(preset: str, **options: Any) -> Result:
    """Which weights ranks compute with, over some steps, and what is left of the masters afterwards."""
    run = Run(preset, **options)
    losses = [run.step(step) for step in range(8)]
    blocks = [block for block in run.model.blocks if isinstance(block, odd_model.Block)]
    masters = {
        name: digest(p.to_local()) for name, p in run.model.named_parameters() if isinstance(p, DTensor)
    }
    with torch.no_grad():
        own = run.weights()
        run.model(inputs(0, 1))
        exact = all(
            torch.equal(block.weights[name], own[f"blocks.{i}.{name}"])
            for i, block in enumerate(blocks)
            for name in block.weights
        )
    before = [block.seen["forward"][-2] for block in blocks]
    return {
        "losses": losses,
        "forward": [block.seen["forward"][:8] for block in blocks],
        "backward": [block.seen["backward"] for block in blocks],
        "masters": masters,
        "exact_without_gradients": exact,
        "trained_on_other_weights": before != [block.seen["forward"][-1] for block in blocks],
        "meter": run.comm.meter.read(8),
        "said": run.comm.said,
        "state_bytes": run.comm.state.nbytes,
    }


def not_finite(preset: str, **options: Any) -> Result:
    """One number of one rank's gradient is NaN, once."""
    run = Run(preset, **options)
    block = run.model.blocks[2]
    assert isinstance(block, odd_model.Block)

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 5] = float("nan") if run.rank == 2 else gradient[0, 5]
        return gradient

    run.backward()
    run.optimizer.zero_grad()
    run.comm.meter.read()
    block.tamper = poison
    run.backward(1)
    hit = run.gradients()["blocks.2.fc1.weight"]
    blocks = run.comm.meter.read()["wire_non_finite"]
    block.tamper = None
    run.optimizer.zero_grad()
    run.backward(2)
    return {
        "row_is_nan": bool(hit[5].isnan().all()),
        "share_that_is_nan": float(hit.isnan().float().mean()),
        "blocks": blocks,
        "finite_afterwards": all(bool(g.isfinite().all()) for g in run.gradients().values()),
    }


def tiny_gradients(preset: str, **options: Any) -> Result:
    run = Run(preset, **options)
    run.backward(scale=0.0)
    zero = all(bool((g == 0).all()) for g in run.gradients().values())
    run.optimizer.zero_grad()
    run.backward(scale=1e-38)
    tiny = max(float(g.abs().max()) for g in run.gradients().values())
    return {"zero_stays_zero": zero, "tiny_stays_tiny": 0 <= tiny < 1e-30}


_REDUCTIONS = 20


def feedback(preset: str, **options: Any) -> Result:
    """How far the mean of many reductions of one gradient is from it."""
    run = Run(preset, **options)
    total: dict[str, Tensor] = {}
    for _ in range(_REDUCTIONS):
        run.optimizer.zero_grad()
        run.backward()
        total = {name: total.get(name, 0) + g for name, g in run.gradients().items()}
    last, reference = run.gradients(), _reference_gradients(run)
    mean = {name: t / _REDUCTIONS for name, t in total.items()}

    def compressed(name: str) -> bool:
        return "fc1.weight" in name

    return {
        "one": _distance(last, reference, compressed),
        "mean": _distance(mean, reference, compressed),
    }


def accumulation(preset: str, **options: Any) -> Result:
    """Two micro-batches, reduced together or each by itself."""
    each = Run(preset, **options)
    for step in (0, 1):
        each.backward(step)
    once = Run(preset, **options)
    once.model.set_requires_gradient_sync(False)  # type: ignore[operator]
    once.backward(0)
    once.model.set_requires_gradient_sync(True)  # type: ignore[operator]
    once.backward(1)
    a, b = each.comm.meter.read(), once.comm.meter.read()
    return {
        "distance": _distance(each.gradients(), once.gradients(), lambda name: True),
        "reduced": a["wire_mib_reduce"] / b["wire_mib_reduce"],
        "gathered": a["wire_mib_gather"] / b["wire_mib_gather"],
    }


def other_parts(preset: str, **options: Any) -> Result:
    """The parameters that have a gradient change."""
    run = Run(preset, **options)
    block = run.model.blocks[0]
    assert isinstance(block, odd_model.Block)
    run.backward()
    plain = block.forward

    def with_unused(x: Tensor) -> Tensor:
        return plain(x) + block.unused(x).mean()

    block.forward = with_unused  # type: ignore[method-assign]
    run.optimizer.zero_grad()
    run.backward(1)
    names = sorted(run.gradients())
    return {"unused_has_one": "blocks.0.unused.weight" in names, "finite": all(
        bool(g.isfinite().all()) for g in run.gradients().values())}  # fmt: skip


def reentrant(preset: str, **options: Any) -> Result:
    """Blocks whose first forward runs without gradients, and a failed forward before."""
    run = Run(preset, **options)
    blocks = [block for block in run.model.blocks if isinstance(block, odd_model.Block)]
    run.step(0)

    def forward(x: Tensor) -> Tensor:
        x = run.model.embed(x)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=True)  # type: ignore[no-untyped-call]
        return run.model.head(x)

    with torch.no_grad(), contextlib.suppress(RuntimeError):
        run.model(torch.zeros(1, 3))
    run.model.forward = forward  # type: ignore[method-assign]
    for block in blocks:
        block.seen = {"forward": [], "backward": []}
    run.step(1)
    return {"digests": [block.seen["forward"] + block.seen["backward"] for block in blocks]}


def alarm(preset: str, **options: Any) -> Result:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    run = Run(preset, **options)
    run.step(0)
    before = run.comm.meter.read()["wire_uncompressed"]
    block = run.model.blocks[1]
    assert isinstance(block, FSDPModule)
    block.set_custom_all_gather(DefaultAllGather())
    run.step(1)
    with torch.no_grad():
        run.model(inputs(0, 1))
    after = run.comm.meter.read()["wire_uncompressed"]
    with torch.no_grad():
        run.model(inputs(0, 1))
    return {"before": before, "after": after, "in_evaluation": run.comm.meter.read()["wire_uncompressed"]}


def message_bytes(preset: str, **options: Any) -> Result:
    """A step's bytes for a model of matrices only, a parameter, against FSDP2 in bf16 throughout."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256, bias=False)])
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    comm = attach(model, mesh, CommConfig(preset=preset, **options))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    read: dict[str, float] = {}
    for _ in range(3):
        read = comm.meter.read()
        model(torch.randn(2, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    read = comm.meter.read()
    plain = 6 * (world - 1) / world * 2 * 256 * 1024
    return {"ratio": read["wire_mib"] * 2**20 / plain}


def choice(preset: str, **options: Any) -> Result:
    """What is chosen, what is said of it, and whether it trains."""
    run = Run(preset, **options)
    losses = [run.step(step) for step in range(4)]
    return {"preset": run.comm.preset, "said": run.comm.said, "losses": losses}


def resume(preset: str, *, folder: str = "", first: int = 1, **options: Any) -> Result:
    """Train, save in the middle, train on; or load and train on."""
    run = Run(preset, **options)
    losses, references = [], {}
    for step in range(0 if first else 3, 6):
        if step == 3 and first:
            write_state(run.state(), Path(folder))
        elif step == 3:
            run.state().load(Path(folder))
        if step == 3:
            references = {
                name: digest(t.full_tensor())
                for name, t in run.comm.state.tensors().items()
                if name.startswith("reference.") and isinstance(t, DTensor)
            }
        losses.append(run.step(step))
    return {
        "losses": losses[-3:],
        "references": references,
        "weights": {name: digest(w) for name, w in run.weights().items()},
        "state": {
            name: digest(t.to_local() if isinstance(t, DTensor) else t)
            for name, t in run.comm.state.tensors().items()
        },
    }


SCENARIOS: dict[str, Callable[..., Result]] = {
    scenario.__name__: scenario
    for scenario in (
        gradients, weights, not_finite, tiny_gradients, feedback, accumulation, other_parts, reentrant, alarm,
        message_bytes, choice, resume,
    )
}  # fmt: skip


def _options(texts: list[str]) -> dict[str, Any]:
    pairs = (text.split("=", 1) for text in texts)
    return {key: int(value) if value.lstrip("-").isdigit() else value for key, value in pairs}


def main(out: str, folder: str, *scenarios: str) -> None:
    results: dict[str, list[Any]] = {}
    with process_group(200) as world:
        for scenario in scenarios:
            name, preset, *texts = scenario.split(":")
            options = _options(texts)
            if name == "resume":
                texts = [text for text in texts if not text.startswith("first")]
                options["folder"] = "-".join([f"{folder}/{preset}", *texts])
            mine = SCENARIOS[name](preset, **options)
            everyone: list[Any] = [None] * world.size
            dist.all_gather_object(everyone, mine)
            results[scenario] = everyone
        if world.is_main:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
