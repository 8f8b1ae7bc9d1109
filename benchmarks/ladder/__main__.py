"""The memory ladder: `python -m benchmarks.ladder`. What does each remedy take off a GPU's peak?

The same model, samples, world and optimizer on every rung: from PyTorch's DDP under autocast (B1), with
checkpointing as U-ViT's authors have it (B2), FSDP2 in bf16 without and with checkpointing (B3, B4), to
dtrain's own remedies, one after another.

No GPU is needed: rank 0 of the world takes its step on tensors without data, and everything that it would
hold is counted, see docs/guide.md, "Planning". Times are estimates at assumed rates, which are printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from benchmarks.environment import origin
from benchmarks.ladder.planned import plan_rungs
from benchmarks.ladder.plot import plot
from benchmarks.ladder.result import SCHEMA_VERSION, Ladder, read
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.table import table
from benchmarks.ladder.workloads import WORKLOADS
from benchmarks.record import write_record
from dtrain.plan.devices import DEVICES, device
from dtrain.plan.estimate import Rates

__all__ = ["main"]

_FILE = "ladder.json"
_EPILOG = f"""
workloads:
{chr(10).join(f"  {name:10} {workload.title}" for name, workload in WORKLOADS.items())}

rungs:
{chr(10).join(f"  {name:10} {rung.title}" for name, rung in RUNGS.items())}

examples:
  python -m benchmarks.ladder                                      all of it, an hour on two cores
  python -m benchmarks.ladder --workloads 2b-33k --worlds 8        one workload, two minutes
  python -m benchmarks.ladder --show                               table and picture of what is there

In OUT: {_FILE} and ladder.png.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 where an argument does not fit."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    try:
        ladder = (
            read(out / _FILE) if arguments.show else _plan(arguments, sys.argv[1:] if argv is None else argv)
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not arguments.show:
        write_record(ladder, out / _FILE)
    plot(ladder, out / "ladder.png")
    print(table(ladder))
    return 0


def _plan(arguments: argparse.Namespace, argv: Sequence[str]) -> Ladder:
    gpu = device(arguments.device)
    place = origin("benchmarks.ladder", argv)
    tasks = [
        (workload, rung, world, arguments.device)
        for workload in arguments.workloads
        for world in arguments.worlds
        for rung in RUNGS
    ]
    rows = tuple(track(plan_rungs(tasks, arguments.jobs), "rungs", total=len(tasks)))
    return Ladder(
        kind="planned",
        schema_version=SCHEMA_VERSION,
        gpu=gpu.name,
        memory_bytes=gpu.memory_bytes,
        assumed=Rates().said(),
        rows=rows,
        **place,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME", help="[all]")
    add("--worlds", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="GPUs [1 8 64]")
    add("--device", choices=DEVICES, default="h100", help="to plan for [h100]")
    add("--jobs", type=int, default=2, help="processes [2]")
    add("--out", type=Path, default=Path("build/ladder"), help="folder [build/ladder]")
    add("--show", action="store_true", help="plan nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
