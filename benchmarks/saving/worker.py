"""One rank's part of the measurement; torchrun starts it.

Both contestants save the same state and take turns, every other round in reverse order. A turn is

    steps without a save                             quiet
    a copy of the state, to compare with
    a save with nothing beside it                    stall, written, bytes on disk
    a save, and training steps until it is written   beside, lost
    every number of the state made NaN, a load       load
    comparison with the copy, bit for bit            gate

so that the gate also sees whether steps beside a save leak into it. Times start at a barrier.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.saving.contestants import Contestant, clear, contestants, disk_bytes
from benchmarks.saving.job import Job
from benchmarks.saving.limits import take_limits
from benchmarks.saving.records import Limits, RankRecord, Record
from benchmarks.saving.training import Training, bytes_that_differ, copied, spoil, whole_bytes
from benchmarks.schema import decode
from dtrain.dist import World, process_group

__all__ = ["main"]

log = logging.getLogger(__name__)

_QUIET_STEPS = 5


def _timed(call: Callable[[], object]) -> float:
    """Seconds, from a barrier on."""
    dist.barrier()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _turn(contestant: Contestant, training: Training, kept: Mapping[str, Tensor], record: Record) -> None:
    """One contestant's part of a round.

    `kept` is overwritten: memory made and freed here would be room for the buffers that plain makes.
    """
    quiet_s = median([_timed(training.step) for _ in range(_QUIET_STEPS)])
    copied(training.state, kept)
    _save_alone(contestant, record)
    _save_beside_steps(contestant, training, record, quiet_s)
    spoil(training.state)
    assert bytes_that_differ(training.state, kept) > 0
    record.load_s += (_timed(contestant.load),)
    record.wrong_bytes += (bytes_that_differ(training.state, kept),)
    clear(contestant.folder)


def _save_alone(contestant: Contestant, record: Record) -> None:
    dist.barrier()
    begun, cpu = time.perf_counter(), time.thread_time()
    contestant.begin()
    stall_s, cpu = time.perf_counter() - begun, time.thread_time() - cpu
    contestant.finish()
    record.written_s += (time.perf_counter() - begun,)
    record.stall_s += (stall_s,)
    record.stall_cpu_s += (cpu,)
    dist.barrier()
    record.disk_bytes += (disk_bytes(contestant.folder),)
    clear(contestant.folder)


def _save_beside_steps(contestant: Contestant, training: Training, record: Record, quiet_s: float) -> None:
    stall_s = _timed(contestant.begin)
    steps_s = [_timed(training.step)]
    while not _all(contestant.done()):
        steps_s.append(_timed(training.step))
    contestant.finish()
    record.quiet_s += (quiet_s,)
    record.beside_s += (median(steps_s),)
    record.lost_s += (stall_s + sum(steps_s) - quiet_s * len(steps_s),)
    record.steps_beside += (len(steps_s),)


def _all(here: bool) -> bool:
    """Whether it is so on every rank."""
    everywhere = torch.tensor(int(here))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def _measure(job: Job, world: World) -> RankRecord:
    folder = Path(job.checkpoints)
    training = Training(job.workload, world)
    saving = contestants(folder, training.state)
    limits, kept = Limits(), copied(training.state)
    for contestant in saving.values():
        _turn(contestant, training, kept, Record())  # first calls make buffers and threads
    records = {name: Record() for name in saving}
    for number in range(job.rounds):
        for name in list(saving)[:: -1 if number % 2 else 1]:
            _turn(saving[name], training, kept, records[name])
            if world.is_main:
                log.info("round %d, %s: %s", number, name, _words(records[name]))
        take_limits(limits, training.state, kept, folder / f"limits-{world.rank}")
    return RankRecord(training.parameters, whole_bytes(training.state), records, limits)


def _words(record: Record) -> str:
    return (
        f"stall {1e3 * record.stall_s[-1]:.0f} ms, written {1e3 * record.written_s[-1]:.0f} ms, "
        f"load {1e3 * record.load_s[-1]:.0f} ms, step {1e3 * record.quiet_s[-1]:.0f} ms, beside a save "
        f"{1e3 * record.beside_s[-1]:.0f} ms"
    )


def main(job_file: str) -> None:
    """Measure what the file says; write this rank's record into the job's folder."""
    job: Job = decode(Job, json.loads(Path(job_file).read_text("utf-8")))
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s: %(message)s")
    torch.set_num_threads(1)
    with process_group() as world:
        record = _measure(job, world)
        (Path(job.out) / f"rank{world.rank}.json").write_text(json.dumps(asdict(record)), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
