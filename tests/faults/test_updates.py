"""Losses of real runs that are not finite, or jump: updates that all ranks pass over."""

import re
from pathlib import Path

import pytest

from dtrain.checkpoint import read_progress, step_folders
from dtrain.metrics.records import read_records
from tests.faults.runs import Run, Tell

pytestmark = pytest.mark.distributed


def test_an_update_that_is_not_finite_is_passed_over(folder: Path, told: Tell) -> None:
    run, faults = Run(folder, "once"), ("nan 22", "inf 45")
    said = run.train(*faults).stderr
    for fault, step, rank in zip(faults, (6, 12), (0, 1), strict=True):
        kind, sample = fault.split()
        assert re.search(
            rf"step {step}: loss {kind}, gradient norm (nan|inf), the update is passed over \(1 in a row\); "
            rf"losses that are not finite are of samples, rank {rank}: {sample}",
            said,
        )
        passed = "all ranks pass over that update; the sample is named"
        told(f"a loss is {kind}", passed, **run.recovery(fault))
    assert sum("the update is passed over" in note for note in run.notes) == 2
    assert run.summary["updates_passed_over"] == 2
    assert run.steps == [8, 16, 20]
    assert "resumed" not in "".join(run.notes)


def test_what_compressed_collectives_remember_is_no_nan(folder: Path, told: Tell) -> None:
    """A residual of such a gradient would spoil every later one."""
    run = Run(folder, "compressed")
    run.train("nan 22", sets=("comm.preset=int8-int4", "comm.exact_below=1"))
    records = read_records(run.path / "metrics.jsonl")
    assert [record["step"] for record in records if record["loss"] == "nan"] == [6]
    assert [record["step"] for record in records if record["wire_non_finite"]] == [6]
    assert run.summary["updates_passed_over"] == 1
    told("… under compressed collectives", "the same; residuals begin anew", **run.recovery("nan 22"))


def test_what_is_never_finite_is_left_out(folder: Path, told: Tell) -> None:
    """Three in a row: back to step 4 without their samples, after which all others are trained on."""
    run = Run(folder, "left-out")
    bad = ("nan 22 always", "nan 25 always", "nan 30 always")
    said = run.train(*bad, sets=("faults.max_bad_steps=3",)).stderr
    assert "the run goes back to step-00000004 and leaves out samples ((20, 32),)" in said
    newest = read_progress(step_folders(run.path / "checkpoints")[-1])
    assert (newest.step, newest.sample, newest.left_out) == (20, 80, ((20, 32),))
    assert (run.summary["updates_passed_over"], run.summary["rollbacks"]) == (3, 1)
    told(
        "a loss is nan at three steps in a row, `faults.max_bad_steps` = 3",
        "back to the newest checkpoint, their samples are left out",
        **run.recovery("nan 30"),
    )


def test_a_run_that_going_back_does_not_help_ends(folder: Path, told: Tell) -> None:
    run = Run(folder, "hopeless")
    bad = [f"nan {sample} always" for sample in range(20, 80)]
    done = run.train(*bad, sets=("faults.max_bad_steps=2",), check=False)
    assert done.returncode
    assert "Going back did not help, 1 time(s) in a row (faults.max_rollbacks)" in done.stderr
    assert done.stderr.count("[rank 0] error: ") == 1
    assert "]: Traceback" not in done.stderr
    assert run.steps == [4]
    told("… and going back does not help", "an error that names the samples")


def test_a_loss_that_jumps_is_passed_over(folder: Path, told: Tell) -> None:
    """The median is known after 32 steps."""
    run = Run(folder, "spike")
    sets = ("faults.spike_factor=20", "train.steps=36", "checkpoint.every=30")
    said = run.train("huge 10", "huge 138", sets=sets).stderr
    assert len(re.findall(r"step \d+: .*the update is passed over", said)) == 1
    assert re.search(r"step 35: loss \d+(\.\d+)? is over 20 times the usual \d\.\d+, the update", said)
    assert len(read_progress(step_folders(run.path / "checkpoints")[-1]).losses) == 32
    told(
        "a loss jumps, `faults.spike_factor` = 20",
        "all ranks pass over that update",
        **run.recovery("huge 138"),
    )
