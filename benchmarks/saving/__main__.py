"""What does a checkpoint cost a training? `python -m benchmarks.saving`

The state of a sharded U-ViT (weights, AdamW's moments, averages, all fp32) is saved and loaded by dtrain and
by torch.distributed.checkpoint as it comes, in turns, in one process group.

  stall          a training step waits for it: the state is copied, then a thread writes
  its CPU time   of the thread that waits: what neighbours on the machine change less
  until written  from its begin, nothing beside it. Both sync the files; ours also hashes them (SHA-256),
                 syncs and renames the folder
  load           of what was just written, so from the page cache. Ours hashes everything first
  step, step beside
                 a training step without a save, and one begun during a save
  lost           by which stall and steps of one save delayed the training; near 0 it is noise
  on disk        over the bytes of the tensors, the floor
  gain           plain over ours in the same round, over 1 is ours faster or smaller

Nothing is reported of a contestant whose load brought one byte back wrong; then the exit status is 1.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import measured_on
from benchmarks.link.neighbours import watch_neighbours
from benchmarks.record import write_record
from benchmarks.saving.job import Job, Workload
from benchmarks.saving.launch import ENVIRONMENT, RanksFailed, filesystem_of, run_job
from benchmarks.saving.result import SCHEMA_VERSION, SavingRun, read_run, world_result
from benchmarks.saving.table import table

__all__ = ["main"]

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  python -m benchmarks.saving                          on one rank and on two, 24M parameters
  python -m benchmarks.saving --ranks 4 --width 1024   four ranks, 93M parameters
  python -m benchmarks.saving --show                   the table of the run that is there

In OUT: saving.json, ranks.log, and while it runs the checkpoints: put it on the disk that matters.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 1 where a rank failed or a gate is red, 2 for a mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out.resolve()
    try:
        run = read_run(out / "saving.json") if arguments.show else _measure(arguments, out)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RanksFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(run))
    return int(not run.passed)


def _parser() -> argparse.ArgumentParser:
    default = Workload()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saving",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="world sizes [1 2]")
    add("--rounds", type=int, default=7, metavar="N", help="measured, at every world size [7]")
    add("--width", type=int, default=default.width, help=f"of the model [{default.width}]")
    add("--depth", type=int, default=default.depth, help=f"blocks but one [{default.depth}]")
    add("--batch", type=int, default=default.batch, help=f"samples of 17 tokens a rank [{default.batch}]")
    add("--out", type=Path, default=Path("build/saving"), metavar="DIR", help="folder [build/saving]")
    add("--show", action="store_true", help="measure nothing")
    return parser


def _measure(arguments: argparse.Namespace, out: Path) -> SavingRun:
    if min(arguments.ranks) < 1:
        raise ValueError(f"ranks = {min(arguments.ranks)}: must be 1 or more")
    workload = Workload(arguments.width, arguments.depth, arguments.batch)
    _ = workload.config  # raises what does not fit before anything starts
    job = Job(workload, arguments.rounds, str(out / "checkpoints"), str(out))
    out.mkdir(parents=True, exist_ok=True)
    run, begun = _empty(workload, out), time.perf_counter()
    for ranks in arguments.ranks:
        log.info("%d rank(s): what they say is in %s", ranks, out / "ranks.log")
        meanwhile = watch_neighbours()
        records = run_job(job, ranks)
        run = replace(
            run,
            parameters=records[0].parameters,
            worlds=(*run.worlds, world_result(records, meanwhile())),
            seconds=time.perf_counter() - begun,
        )
        write_record(run, out / "saving.json")
    return run


def _empty(workload: Workload, out: Path) -> SavingRun:
    return SavingRun(
        schema_version=SCHEMA_VERSION,
        workload=workload,
        parameters=0,
        filesystem=filesystem_of(out),
        worlds=(),
        environment=dict(ENVIRONMENT),
        load_average=os.getloadavg()[0],
        seconds=0.0,
        **measured_on("cpu", "benchmarks.saving", sys.argv[1:]),
    )


if __name__ == "__main__":
    sys.exit(main())
