"""Data workers of real runs that die or stall, and a disk that is full."""

import re
from pathlib import Path

import pytest

from dtrain.metrics.records import read_records
from tests.faults.runs import Run, Tell, assert_same_weights

pytestmark = pytest.mark.distributed


def test_data_workers_are_started_again(folder: Path, undisturbed: Run, told: Tell) -> None:
    run = Run(folder, "workers")
    said = run.train(
        "worker_dies 21", "worker_hangs 46", sets=("faulty.workers=2", "faults.hang_s=100")
    ).stderr
    assert re.search(r"rank 1: data workers failed before samples \d+ to \d+: DataLoader worker \(pid", said)
    assert re.search(r"rank 0: data workers failed before samples \d+ to \d+: DataLoader timed out", said)
    assert run.summary["worker_restarts"] == 2
    assert_same_weights(run, undisturbed)
    again = "started again where it stood, named"
    told("a data worker dies", again, same_weights=True, **run.recovery("worker_dies 21"))
    told("a data worker gives nothing for 12 s", again, same_weights=True, **run.recovery("worker_hangs 46"))


def test_a_sample_that_kills_its_reader_is_named(folder: Path, told: Tell) -> None:
    done = Run(folder, "poison").train(
        "worker_dies 21 always", sets=("faulty.workers=1", "faults.hang_s=100"), check=False
    )
    assert done.returncode
    named = r"\[rank 1\] error: .*samples 21 to 21: .*, 3 times: one of these samples kills or stalls"
    assert re.search(named, done.stderr), done.stderr[-6000:]
    told("… three times at one sample", "an error that names the sample")


def test_a_full_disk_ends_nothing(folder: Path, undisturbed: Run, told: Tell) -> None:
    """Of both ranks, from step 6 to step 15: saves of steps 8 to 14 fail, and rank 0 cannot log either."""
    run = Run(folder, "full")
    fills, empties = ("disk_fills 20", "disk_fills 21"), ("disk_empties 56", "disk_empties 57")
    said = run.train(*fills, *empties).stderr
    assert "step 8 could not be saved (1 in a row)" in said
    assert re.search(r"step 1\d is saved, \d before it failed", said)
    assert "metrics.jsonl: [Errno 27] File too large; its lines are kept in memory" in said
    assert [record["step"] for record in read_records(run.path / "metrics.jsonl")] == [*range(1, 21)]
    assert run.summary["failed_saves"] >= 2
    assert_same_weights(run, undisturbed)
    told(
        "the disk is full for ten steps",
        "the run goes on, says so, and tries again; records are kept in memory",
        steps_lost=0,
        same_weights=True,
    )
