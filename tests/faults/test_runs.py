"""Faults of real runs under torchrun: what survives, what is named, what is lost."""

import re
from pathlib import Path

import pytest

from dtrain.checkpoint import read_progress, step_folders
from dtrain.metrics import read_records
from tests.faults.runs import Run, assert_same_weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    run = Run(folder, "undisturbed")
    run.train()
    assert run.steps == [12, 16, 20]
    return run


def test_sigterm_to_one_rank_ends_the_run_after_its_step(folder: Path, undisturbed: Run) -> None:
    """Sample 26 is trained on in step 7, by rank 0 or 1: both save after the next, and exit with 0."""
    run = Run(folder, "term")
    said = run.train("term 26").stderr
    assert run.steps == [4, 8]
    assert "stopped after step 8 as" in "".join(run.notes)
    assert "Traceback" not in said
    run.train("term 26")
    assert_same_weights(run, undisturbed)


def test_a_killed_rank_is_started_again(folder: Path, undisturbed: Run) -> None:
    run = Run(folder, "kill")
    run.train("kill 30", "kill 57", restarts=2)
    assert {path.name for path in run.path.glob("kill-*")} == {"kill-30", "kill-57"}
    assert "resumed at step 12" in "".join(run.notes)
    assert_same_weights(run, undisturbed)


@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(kind: str, folder: Path, undisturbed: Run) -> None:
    """Rank 1 has samples 4n + 1 and 4n + 3: 29 is of step 8."""
    run = Run(folder, kind)
    said = run.train(f"{kind} 29", restarts=1, sets=("faults.hang_s=15",)).stderr
    if kind == "hang":
        assert "hang: rank 1 is behind: forward and backward of step 8 for" in said
        assert "in _happen\n    time.sleep(_FOR_EVER_S)" in said
    else:
        assert "hang: rank 1 gives no sign: stopped, or its host is gone" in said
    assert re.search(
        r"hang: rank 0 forward and backward of step 8 for \d+ s, pending: gloo:\w+ \d+ of \(", said
    )
    pages = sorted(path.name for path in (run.path / "hang-00000008").iterdir())
    assert pages == (["rank-0.txt", "rank-1.txt"] if kind == "hang" else ["rank-0.txt"])
    assert_same_weights(run, undisturbed)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_an_update_that_is_not_finite_is_passed_over(kind: str, folder: Path) -> None:
    run = Run(folder, f"once-{kind}")
    said = run.train(f"{kind} 22").stderr
    named = (
        f"step 6: loss {kind}, gradient norm nan, the update is passed over (1 in a row); losses that are not"
    )
    assert named in said.replace("norm inf", "norm nan")
    assert "are not finite are of samples, rank 0: 22" in said
    assert sum("the update is passed over" in note for note in run.notes) == 1
    assert run.steps == [12, 16, 20]
    assert "resumed" not in "".join(run.notes)


def test_what_is_never_finite_is_left_out(folder: Path) -> None:
    """Three in a row: back to step 4 without their samples, after which all others are trained on."""
    run = Run(folder, "left-out")
    bad = ("nan 22 always", "nan 25 always", "nan 30 always")
    said = run.train(*bad, sets=("faults.max_bad_steps=3",)).stderr
    assert "the run goes back to step-00000004 and leaves out samples ((20, 32),)" in said
    newest = read_progress(step_folders(run.path / "checkpoints")[-1])
    assert (newest.step, newest.sample, newest.left_out) == (20, 80, ((20, 32),))


def test_a_run_that_going_back_does_not_help_ends(folder: Path) -> None:
    run = Run(folder, "hopeless")
    bad = [f"nan {sample} always" for sample in range(20, 80)]
    done = run.train(*bad, sets=("faults.max_bad_steps=2",), check=False)
    assert done.returncode
    assert "Going back did not help, 1 time(s) in a row (faults.max_rollbacks)" in done.stderr
    assert run.steps == [4]


def test_data_workers_are_started_again(folder: Path, undisturbed: Run) -> None:
    run = Run(folder, "workers")
    said = run.train(
        "worker_dies 21", "worker_hangs 46", sets=("faulty.workers=2", "faults.hang_s=100")
    ).stderr
    assert re.search(r"rank 1: data workers failed before samples \d+ to \d+: DataLoader worker \(pid", said)
    assert re.search(r"rank 0: data workers failed before samples \d+ to \d+: DataLoader timed out", said)
    assert_same_weights(run, undisturbed)


def test_a_sample_that_kills_its_reader_is_named(folder: Path) -> None:
    done = Run(folder, "poison").train(
        "worker_dies 21 always", sets=("faulty.workers=1", "faults.hang_s=100"), check=False
    )
    assert done.returncode
    named = r"samples 21 to 21: .*, 3 times: one of these samples kills or stalls"
    assert re.search(named, done.stderr), done.stderr[-6000:]


def test_a_loss_that_jumps_is_passed_over(folder: Path) -> None:
    """The median is known after 32 steps."""
    run = Run(folder, "spike")
    sets = ("faults.spike_factor=20", "train.steps=36", "checkpoint.every=30")
    said = run.train("huge 10", "huge 138", sets=sets).stderr
    assert len(re.findall(r"step \d+: .*the update is passed over", said)) == 1
    assert re.search(r"step 35: loss \d+(\.\d+)? is over 20 times the usual \d\.\d+, the update", said)
    assert len(read_progress(step_folders(run.path / "checkpoints")[-1]).losses) == 32


def test_a_replica_that_has_diverged_is_named(folder: Path) -> None:
    """Three copies, of which rank 1 alters one bit at step 3: sample 13."""
    run = Run(folder, "replicas", ranks=3)
    sets = ("mesh.replicate=3", "train.global_batch=6", "faults.check_replicas_every=2")
    done = run.train("flip 13", sets=sets, check=False)
    assert done.returncode
    named = "after step 4 rank(s) 1 hold other weights than their replicas, rank 1 from blocks.1.proj.weight"
    assert named in done.stderr
    sound = Run(folder, "sound-replicas", ranks=3)
    sound.train(sets=sets)
    assert "hold other weights" not in "".join(sound.notes)


def test_worlds_change_and_samples_do_not(folder: Path) -> None:
    """2, then 4, 1 and 3 ranks, with replicas among them, see what 2 ranks see, and the same noise."""
    sets = ("train.global_batch=12", "model.dropout=0", "optim.warmup_steps=3")
    stays = Run(folder, "stays")
    stays.train(sets=(*sets, "train.steps=8"))
    for stage, (ranks, replicate) in enumerate([(2, 1), (4, 2), (1, 1), (3, 1)], start=1):
        moves = Run(folder, "moves", ranks=ranks)
        moves.train(sets=(*sets, f"train.steps={2 * stage}", f"mesh.replicate={replicate}"))
    wanted, found = (
        {record["step"]: record["loss"] for record in read_records(run.path / "metrics.jsonl")}
        for run in (stays, moves)
    )
    assert set(wanted) == set(range(1, 9))
    assert found == pytest.approx(wanted, rel=1e-4)
