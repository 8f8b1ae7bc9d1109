"""`python -m benchmarks.scale.overlap`: what of gathers, sums and codecs a GPU does beside compute, measured.

Several ranks share one GPU and move bytes by gloo, through the host. FSDP2's streams, its schedule and the
codecs' kernels are those of a real job; the wire is not, and ranks take turns on the GPU. So the figure is
which share of the time of collectives, codecs and wire together, lies beside a block's compute, and no speed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.multiprocessing.spawn import spawn

from benchmarks.environment import measured_on
from benchmarks.record import Measured, write_record
from benchmarks.scale.timeline import Span, Timeline, beside, total
from dtrain.comm import CommConfig, attach
from dtrain.comm.all_gather import WeightGather
from dtrain.comm.config import PRESETS, Preset
from dtrain.comm.reduce_scatter import GradientReduce
from dtrain.dist import leave_process_group

__all__ = ["Overlap", "main", "shares"]

_COLLECTIVES = {"gather": (WeightGather, DefaultAllGather), "reduce": (GradientReduce, DefaultReduceScatter)}
_WARMUP = 3
_MEASURED: tuple[Preset, ...] = ("none", "int8", "int8-int4", "int4-delta")


@dataclass(frozen=True)
class Shape:
    """A stack of MLPs, and how it is measured.

    Args:
        width: of a block, which has 8·width² parameters.
        tokens: of a rank and step.
    """

    device: Literal["cpu", "cuda"]
    ranks: int
    depth: int
    width: int
    tokens: int
    steps: int


_SHAPES = {
    "cuda": Shape("cuda", ranks=2, depth=6, width=1024, tokens=65536, steps=7),
    "cpu": Shape("cpu", ranks=2, depth=2, width=48, tokens=64, steps=2),
}


@dataclass(frozen=True)
class Overlap:
    """Medians over the steps of rank 0, a step."""

    preset: str = field(metadata={"help": "of dtrain.comm; none: FSDP2's own collectives"})
    step_ms: float = field(metadata={"help": "from the first kernel to the last"})
    compute_ms: float = field(metadata={"help": "spans of blocks, forward and backward"})
    gather_ms: float = field(metadata={"help": "gathers: codecs, bytes, and waiting for the other ranks"})
    reduce_ms: float = field(metadata={"help": "sums of gradients, likewise"})
    collective_ms: float = field(metadata={"help": "either of them, counted once"})
    beside_ms: float = field(metadata={"help": "of that, beside a block's compute"})
    share_beside: float = field(metadata={"help": "beside_ms / collective_ms"})
    codec_ms: float = field(metadata={"help": "of collectives, the codecs, in a step that is sampled"})


@dataclass(frozen=True, kw_only=True)
class OverlapRun(Measured):
    """The file; all ranks share the device."""

    kind: Literal["measurement", "rehearsal"] = field(metadata={"help": "rehearsal: on a CPU, all in turn"})
    schema_version: int = field(metadata={"help": "version of this format"})
    shape: Shape = field(metadata={"help": "what was run"})
    overlaps: tuple[Overlap, ...] = field(metadata={"help": "by preset"})


class Mark(torch.autograd.Function):
    """The identity, which notes when the compute stream gets here, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[], None], backward: Callable[[], None]) -> Tensor:
        ctx.note = backward
        forward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.note()
        return gradients[0], None, None


class Block(nn.Module):
    """x + MLP(x), with spans of the lane "compute" around the MLP, inside of FSDP2's hooks."""

    timeline: Timeline | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mark: Any = Mark.apply
        y = mark(x, partial(self._note, "begin"), partial(self._note, "end"))
        y = self.fc2(F.gelu(self.fc1(y)))
        out: Tensor = x + mark(y, partial(self._note, "end"), partial(self._note, "begin"))
        return out

    def _note(self, what: str) -> None:
        if self.timeline is not None:
            getattr(self.timeline, what)("compute")


def shares(spans: dict[str, list[Span]]) -> dict[str, float]:
    """Of one step's spans by lane, all but `codec_ms` of `Overlap`."""
    gathers, sums, compute = (spans.get(lane, []) for lane in ("gather", "reduce", "compute"))
    collective = total([*gathers, *sums])
    hidden = beside([*gathers, *sums], compute)
    return {
        "step_ms": total(spans.get("step", [])),
        "compute_ms": total(compute),
        "gather_ms": total(gathers),
        "reduce_ms": total(sums),
        "collective_ms": collective,
        "beside_ms": hidden,
        "share_beside": hidden / collective if collective else 0.0,
    }


@contextmanager
def _timed(timeline: Timeline) -> Iterator[None]:
    """Spans around every collective, on the stream that FSDP2 calls it on."""

    def around(inner: Callable[..., Any], lane: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with timeline.span(lane):
                return inner(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for lane, owners in _COLLECTIVES.items():
            for owner in owners:
                stack.enter_context(mock.patch.object(owner, "__call__", around(owner.__call__, lane)))
        yield


def _measure(shape: Shape, preset: Preset, mesh: DeviceMesh) -> Overlap:
    torch.manual_seed(0)
    blocks = [Block(shape.width) for _ in range(shape.depth)]
    model = nn.Sequential(*blocks).to(shape.device)
    dtype = torch.bfloat16 if shape.device == "cuda" else torch.float32
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=mixed)
    comm = attach(model, mesh, CommConfig(preset=preset, exact_below=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    # With a gradient of its own, or the first block's marks would not see the backward.
    x = torch.randn(shape.tokens, shape.width, device=shape.device, requires_grad=True)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    for _ in range(_WARMUP):
        step()
    found = [_step_shares(shape, blocks, step) for _ in range(shape.steps)]
    comm.meter.read()
    comm.meter.sample = True
    step()
    medians = {name: median(one[name] for one in found) for name in found[0]}
    return Overlap(preset=preset, codec_ms=comm.meter.read()["wire_codec_ms"], **medians)


def _step_shares(shape: Shape, blocks: Sequence[Block], step: Callable[[], None]) -> dict[str, float]:
    dist.barrier()
    timeline = Timeline(shape.device)
    for block in blocks:
        block.timeline = timeline
    with _timed(timeline), timeline.span("step"):
        step()
    for block in blocks:
        block.timeline = None
    return shares(timeline.spans())


def _rank(rank: int, shape: Shape, presets: Sequence[Preset], folder: str) -> None:
    """One process; rank 0 leaves what it measured in `folder`."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(shape.ranks), "LOCAL_RANK": "0"}
    if shape.device == "cuda":
        torch.zeros((), device="cuda:0")
    dist.init_process_group(
        "cpu:gloo,cuda:gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=shape.ranks,
        timeout=timedelta(seconds=200),
    )
    mesh = init_device_mesh(shape.device, (shape.ranks,))
    overlaps = [_measure(shape, preset, mesh) for preset in presets]
    if rank == 0:
        Path(folder, "overlaps.json").write_text(json.dumps([asdict(one) for one in overlaps]))
    leave_process_group()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.overlap", description=__doc__)
    add = parser.add_argument
    add("--device", choices=list(_SHAPES), default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: a tiny rehearsal, where nothing runs beside anything")  # fmt: skip
    add(
        "--presets",
        nargs="+",
        choices=[p for p in PRESETS if p != "auto"],
        default=list(_MEASURED),
        help="which",
    )
    add("--ranks", type=int, help="that share the GPU [2]")
    for name in ("depth", "width", "tokens", "steps"):
        add(f"--{name}", type=int, help=f"on a GPU [{getattr(_SHAPES['cuda'], name)}]")
    add("--out", type=Path, default=Path("build/scale"), help="folder for overlap.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 where an argument does not fit."""
    arguments = _arguments(argv)
    given = {
        k: v for k in ("ranks", "depth", "width", "tokens", "steps") if (v := vars(arguments)[k]) is not None
    }
    if any(value < 1 for value in given.values()) or given.get("ranks", 2) < 2:
        print(f"error: {given}: must all be 1 or more, and ranks 2 or more", file=sys.stderr)
        return 2
    shape = Shape(**asdict(_SHAPES[arguments.device]) | given)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (shape, arguments.presets, folder), nprocs=shape.ranks)
        overlaps = json.loads(Path(folder, "overlaps.json").read_text())
    run = OverlapRun(
        kind="measurement" if shape.device == "cuda" else "rehearsal",
        schema_version=1,
        shape=shape,
        overlaps=tuple(Overlap(**one) for one in overlaps),
        **measured_on(shape.device, "benchmarks.scale.overlap", sys.argv[1:] if argv is None else argv),
    )
    write_record(run, arguments.out / "overlap.json")
    print((arguments.out / "overlap.json").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
