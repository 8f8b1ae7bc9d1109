"""The memory ladder: `python -m benchmarks.ladder`. What does each remedy take off a GPU's peak?

The same model, samples, world and optimizer on every rung: from PyTorch's DDP under autocast (B1), with
checkpointing as U-ViT's authors have it (B2), FSDP2 in bf16 without and with checkpointing (B3, B4), to
dtrain's own remedies, one after another.

No GPU is needed: rank 0 of the world takes its step on tensors without data, and everything that it would
hold is counted, see docs/guide.md, "Planning". Times are estimates at assumed rates, which are printed.

With --measure rank 0 takes its steps on this machine's GPU, a rung a process, beside what is planned of it.
Its process group has as many ranks as it should and moves no data: memory is a real rank 0's, steps are
without communication. First a gate: at a tiny size all rungs that do not round have B1's loss and gradients.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from benchmarks.environment import origin
from benchmarks.ladder.measured import Wanted, measure
from benchmarks.ladder.planned import plan_rungs
from benchmarks.ladder.plot import plot, plot_measured
from benchmarks.ladder.result import SCHEMA_VERSION, Ladder, MeasuredLadder, read, read_measured
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.table import measured_table, table
from benchmarks.ladder.workloads import WORKLOADS
from benchmarks.record import write_record
from dtrain.plan.devices import DEVICES, device
from dtrain.plan.estimate import Rates

__all__ = ["main"]

_FILE = "ladder.json"
_MEASURED_FILE = "ladder-measured.json"
_EPILOG = f"""
workloads:
{chr(10).join(f"  {name:10} {workload.title}" for name, workload in WORKLOADS.items())}

rungs:
{chr(10).join(f"  {name:10} {rung.title}" for name, rung in RUNGS.items())}

examples:
  python -m benchmarks.ladder                                      all of it, an hour on two cores
  python -m benchmarks.ladder --workloads 2b-33k --worlds 8        one workload, two minutes
  python -m benchmarks.ladder --show                               table and picture of what is there
  python -m benchmarks.ladder --measure --workloads h2 --worlds 8  on this machine's GPU, two minutes
  python -m benchmarks.ladder --measure --rehearse --rungs B1 B4   tiny models on the CPU

In OUT: {_FILE} and ladder.png; {_MEASURED_FILE} and ladder-measured.png.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 where an argument does not fit."""
    arguments = _parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    try:
        return _measured(arguments, given) if arguments.measure else _planned(arguments, given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _planned(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    out: Path = arguments.out
    if arguments.rehearse:
        raise ValueError("--rehearse: nothing to rehearse without --measure; leave it out")
    ladder = read(out / _FILE) if arguments.show else _plan(arguments, argv)
    if not arguments.show:
        write_record(ladder, out / _FILE)
    plot(ladder, out / "ladder.png")
    print(table(ladder))
    return 0


def _measured(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Exit status 1 where a rung failed or a gate is red; a rung out of memory is a result."""
    out: Path = arguments.out

    def note(part: MeasuredLadder) -> None:
        write_record(part, out / _MEASURED_FILE)  # a run that is cut short keeps what it has
        if part.rows:
            print(f"{len(part.rows)}: {part.rows[-1]}", file=sys.stderr, flush=True)

    if arguments.show:
        ladder = read_measured(out / _MEASURED_FILE)
    else:
        names = arguments.workloads, arguments.worlds, arguments.rungs
        ladder = measure(Wanted(*names, arguments.rehearse, arguments.budget_s, arguments.jobs), argv, note)
    plot_measured(ladder, out / "ladder-measured.png")
    print(measured_table(ladder))
    return 0 if ladder.sound else 1


def _plan(arguments: argparse.Namespace, argv: Sequence[str]) -> Ladder:
    gpu = device(arguments.device)
    place = origin("benchmarks.ladder", argv)
    tasks = [
        (workload, rung, world, arguments.device)
        for workload in arguments.workloads
        for world in arguments.worlds
        for rung in arguments.rungs
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
    add("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), metavar="NAME", help="[all]")
    add("--device", choices=DEVICES, default="h100", help="to plan for [h100]")
    add("--jobs", type=int, default=max(2, (os.cpu_count() or 1) // 2), help="processes [half the CPU]")
    add("--out", type=Path, default=Path("build/ladder"), help="folder [build/ladder]")
    add("--show", action="store_true", help="plan and measure nothing")
    add("--measure", action="store_true", help="on this machine's GPU")
    add("--rehearse", action="store_true", help="measure tiny models on the CPU")
    add("--budget-s", type=float, default=3600.0, help="seconds in which rungs begin to be measured [3600]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
