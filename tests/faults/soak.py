"""A soak: a run that meets a random fault every few steps ends with the weights of one that meets none.

    python -m tests.faults.soak --steps 1000 --every 50 --out build/soak

Two ranks under torchrun train the tiny DiT. Ranks are killed, asked to stop, and hang; checkpoints are
damaged between two lives of the run; some samples are NaN, for the undisturbed run too, which passes over the
same updates. What happened, and what it cost, goes to OUT/soak.json.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.environment import origin
from dtrain.checkpoint import read_progress, step_folders
from dtrain.records import read_records
from tests.faults.runs import Run, assert_same_weights
from tests.faults.test_checkpoints import HARM

__all__ = ["main", "soak"]

_BATCH = 4
_KINDS = ("kill", "term", "hang", "stop")
_DAMAGE = 0.3  # of the lives begin with a damaged checkpoint


@dataclass(frozen=True)
class Life:
    """From a start of torchrun to its end.

    Attributes:
        began, ended: steps; it began at a checkpoint.
        fault: that ended it, "" if none did.
        exit_status: of torchrun.
        damaged: what was done to the newest checkpoint before.
        seconds: that it took.
        lost: steps of the life before that had to be trained again.
    """

    began: int
    ended: int
    fault: str
    exit_status: int
    damaged: str
    seconds: float
    lost: int


def soak(folder: Path, steps: int, every: int, seed: int) -> list[Life]:
    """Train with faults and without; raises AssertionError where anything differs.

    Args:
        folder: for both runs.
        steps: of each.
        every: steps between faults, on average.
        seed: of the faults.
    """
    draw = random.Random(seed)
    count = max(1, steps // every)
    samples = draw.sample(range(8 * _BATCH, steps * _BATCH), 2 * count)
    nan = [f"nan {sample} always" for sample in samples[: max(1, count // 5)]]
    faults = [f"{draw.choice(_KINDS)} {sample}" for sample in samples[max(1, count // 5) :][:count]]
    sets = (f"train.steps={steps}", "faults.hang_s=10", "metrics.progress=none", "optim.warmup_steps=100")
    calm = Run(folder, "undisturbed")
    calm.train(*nan, sets=sets)
    run, lives = Run(folder, "soak"), list[Life]()
    with Progress() as bar:
        task = bar.add_task("steps", total=steps)
        while not lives or lives[-1].ended < steps:
            lives.append(_live(run, [*nan, *faults], sets, lives, draw))
            bar.update(task, completed=lives[-1].ended)
            if len(lives) > 3 * count + 3:
                raise AssertionError(f"{len(lives)} lives, and not at the end: {lives[-1]}")
    assert_same_weights(run, calm, steps)
    return lives


def _live(
    run: Run, faults: Sequence[str], sets: tuple[str, ...], lives: Sequence[Life], draw: random.Random
) -> Life:
    damaged = _damage(run, draw) if draw.random() < _DAMAGE else ""
    before = {path.name for path in run.path.glob("*-*")}
    start = time.perf_counter()
    done = run.train(*faults, sets=sets, check=False)
    seconds = time.perf_counter() - start
    happened = sorted({path.name for path in run.path.glob("*-*")} - before)
    fault = ", ".join(name for name in happened if name.split("-")[0] in _KINDS and "-0" not in name)
    records = read_records(run.path / "metrics.jsonl")
    began = _began(run.notes)
    lost = lives[-1].ended - began if lives else 0
    if done.returncode and not fault:
        raise AssertionError(f"ended with {done.returncode} and no fault: {done.stderr[-3000:]}")
    return Life(began, records[-1]["step"], fault, done.returncode, damaged, round(seconds, 1), lost)


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
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.out.resolve()
    lives = soak(folder, arguments.steps, arguments.every, arguments.seed)
    newest = read_progress(step_folders(folder / "soak" / "checkpoints")[-1])
    record: dict[str, Any] = {
        **origin("tests.faults.soak", sys.argv[1:] if argv is None else argv),
        "steps": newest.step,
        "lives": [asdict(life) for life in lives],
        "same_weights": True,
    }
    (folder / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    for life in lives:
        print(life)
    return 0


if __name__ == "__main__":
    sys.exit(main())
