"""Ranks of real runs that are told to stop, are killed, hang or diverge."""

import random
import re
import signal
from pathlib import Path

import pytest

from tests.faults.harm import flip
from tests.faults.runs import Run, Tell, assert_same_weights

pytestmark = pytest.mark.distributed


def test_signals_end_the_run_after_a_step(folder: Path, undisturbed: Run, told: Tell) -> None:
    """To torchrun, which ends with a status of its own; then to one rank each, whose exit status is 0.

    Samples 26 and 46 are trained on in steps 7 and 12: all ranks save after the next.
    """
    run, faults = Run(folder, "signals"), ("term 26", "int 46")
    with run.started("--standalone", sets=("faulty.step_s=0.1",)) as process:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert run.steps
    assert run.steps[-1] < 8
    assert f"stopped after step {run.steps[-1]} as SIGTERM asked: saving" in run.notes
    for fault, step, name in zip(faults, (8, 13), ("SIGTERM", "SIGINT"), strict=True):
        said = run.train(*faults).stderr
        assert run.steps[-1] == step
        assert f"stopped after step {step} as" in run.notes[-1]
        assert "Traceback" not in said
        saved_s = run.seconds_to_save(fault, step)
        all_end = "all ranks finish the next step, save, exit with 0"
        told(f"{name} to one rank", all_end, steps_lost=0, seconds=saved_s, same_weights=True)
    run.train(*faults)
    assert_same_weights(run, undisturbed)


def test_a_killed_rank_is_started_again(folder: Path, undisturbed: Run, told: Tell) -> None:
    run = Run(folder, "kill")
    run.train("kill 30", "kill 57", restarts=2)
    assert {path.name for path in run.path.glob("kill-*")} == {"kill-30", "kill-57"}
    assert "resumed at step 12" in "".join(run.notes)
    assert_same_weights(run, undisturbed)
    for number, fault in enumerate(("kill 30", "kill 57"), start=1):
        what = f"`kill -9` of a rank, {'once' if number == 1 else 'and once more'}"
        told(
            what,
            "torchrun starts all again, they resume from the newest checkpoint",
            same_weights=True,
            **run.recovery(fault),
        )


def test_a_damaged_checkpoint_is_not_resumed_from(folder: Path, undisturbed: Run, told: Tell) -> None:
    run = Run(folder, "damaged")
    assert run.train("kill 57", check=False).returncode
    flip(run.path / "checkpoints" / "step-00000012" / "__1_0.distcp", random.Random(0))
    said = run.train("kill 57").stderr
    assert "step-00000012 is damaged and not used" in said
    assert "resumed at step 8" in "".join(run.notes)
    assert_same_weights(run, undisturbed)
    told(
        "… and a bit of the newest checkpoint is flipped",
        "it is named, the one before is used",
        same_weights=True,
        **run.recovery("kill 57"),
    )


@pytest.mark.parametrize("kind", ["hang", "stop"])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    kind: str, folder: Path, undisturbed: Run, told: Tell
) -> None:
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
    what = "a rank hangs" if kind == "hang" else "a rank is stopped (SIGSTOP)"
    told(
        f"{what}, `faults.hang_s` = 15",
        "it is named, with its stack and what the others wait for; all end and are started again",
        same_weights=True,
        **run.recovery(f"{kind} 29"),
    )


def test_a_replica_that_has_diverged_is_named(folder: Path, told: Tell) -> None:
    """Three copies, of which rank 1 alters one bit at step 3: sample 13. Sound ones are in test_worlds."""
    run = Run(folder, "replicas", ranks=3)
    sets = ("mesh.replicate=3", "train.global_batch=6", "faults.check_replicas_every=2")
    done = run.train("flip 13", sets=sets, check=False)
    assert done.returncode
    assert "error: after step 4 rank(s) 1 hold other weights than their replicas" in done.stderr
    assert "rank 1 from blocks.1.proj.weight" in done.stderr
    assert "]: Traceback" not in done.stderr
    told(
        "one bit of one replica's weights flips",
        "an error that names the rank and the parameter at the next check",
    )
