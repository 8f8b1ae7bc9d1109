"""A soak: a run that meets a random fault every few steps ends with the weights of one that meets none.

    python -m tests.faults.soak --steps 1000 --every 50 --json benchmarks/results/faults/soak.json

Two ranks under torchrun train the tiny DiT. Ranks are killed, asked to stop, hang and are stopped; some
checkpoints are damaged between two lives of the run; some samples are NaN, for the undisturbed run too, which
passes over the same updates.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from benchmarks.environment import measured_on
from benchmarks.faults import Life, Soak, soak_table
from benchmarks.record import write_record
from dtrain.checkpoint import step_folders
from dtrain.metrics.records import read_records
from tests.faults.harm import HARM
from tests.faults.runs import BATCH, Run, assert_same_weights

__all__ = ["main", "soak"]

KINDS = ("kill", "term", "hang", "stop")
_DAMAGE = 0.3  # of the lives begin with a damaged checkpoint
_FIRST = 8  # steps without a fault, so that there is a checkpoint


def soak(folder: Path, steps: int, every: int, seed: int, argv: Sequence[str] = ()) -> Soak:
    """Train with faults and without; raises AssertionError where anything differs.

    Args:
        folder: for both runs.
        steps: of each.
        every: steps between faults, on average.
        seed: of the faults.
        argv: of the command, for the record.
    """
    origin, draw = measured_on("cpu", "tests.faults.soak", argv), random.Random(seed)
    count = max(1, steps // every)
    of_nan = max(1, count // 5)
    samples = draw.sample(range(_FIRST * BATCH, steps * BATCH), of_nan + count)
    nan = [f"nan {sample} always" for sample in samples[:of_nan]]
    # Each kind as often as the others, at random places.
    faults = [f"{KINDS[number % len(KINDS)]} {sample}" for number, sample in enumerate(samples[of_nan:])]
    sets = (f"train.steps={steps}", "faults.hang_s=10", "metrics.progress=none", "optim.warmup_steps=100")
    calm, start = Run(folder, "undisturbed"), time.perf_counter()
    calm.train(*nan, sets=sets)
    calm_s = time.perf_counter() - start
    run, lives = Run(folder, "soak"), list[Life]()
    with Progress() as bar:
        task = bar.add_task("steps", total=steps)
        while not lives or lives[-1].exit_status or lives[-1].ended < steps:
            lives.append(_live(run, [*nan, *faults], sets, lives, draw))
            bar.update(task, completed=lives[-1].ended)
            if len(lives) > 3 * count + 3:
                raise AssertionError(f"{len(lives)} lives, and not at the end: {lives[-1]}")
    happened = {name.replace("-", " ") for life in lives for name in life.faults}
    if happened != set(faults):
        raise AssertionError(f"never happened: {set(faults) - happened}")
    return Soak(
        **origin,
        steps=steps,
        ranks=run.ranks,
        passed_over=sum("passed over" in note for note in calm.notes),
        lives=tuple(lives),
        compared=assert_same_weights(run, calm, steps),
        undisturbed_s=round(calm_s, 1),
    )


def _live(
    run: Run, faults: Sequence[str], sets: tuple[str, ...], lives: Sequence[Life], draw: random.Random
) -> Life:
    damaged = _damage(run, draw) if draw.random() < _DAMAGE else ""
    before = _met(run)
    start = time.perf_counter()
    done = run.train(*faults, sets=sets, check=False)
    seconds = time.perf_counter() - start
    met = tuple(sorted(_met(run) - before, key=lambda name: int(name.split("-")[1])))
    began = _began(run.notes)
    ended = read_records(run.path / "metrics.jsonl")[-1]["step"]
    if done.returncode and not met:
        raise AssertionError(f"ended with {done.returncode} and no fault: {done.stderr[-3000:]}")
    lost = lives[-1].ended - began if lives else 0
    return Life(began, ended, met, done.returncode, damaged, round(seconds, 1), lost)


def _met(run: Run) -> set[str]:
    """Faults that have happened, such as "kill-77", in the order of their samples."""
    return {file.name for kind in KINDS for file in run.path.glob(f"{kind}-*") if file.is_file()}


def _began(notes: Sequence[str]) -> int:
    """The step that the newest life resumed at."""
    resumed = [note for note in notes if note.startswith("resumed at step ")]
    return int(resumed[-1].split()[3].rstrip(",")) if resumed else 0


def _damage(run: Run, draw: random.Random) -> str:
    """Harm the newest checkpoint, if it is not the last one."""
    folders = step_folders(run.path / "checkpoints")
    if len(folders) < 2:
        return ""
    file = draw.choice(sorted(folders[-1].iterdir()))
    harm = draw.choice(HARM)
    harm(file, draw)
    return f"{harm.__name__} {folders[-1].name}/{file.name}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="steps between faults, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        words = sys.argv[1:] if argv is None else argv
        found = soak(Path(folder), arguments.steps, arguments.every, arguments.seed, words)
    write_record(found, arguments.json)
    print("\n".join(soak_table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
