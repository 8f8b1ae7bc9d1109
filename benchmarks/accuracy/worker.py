"""All seeds of one variant, under torchrun: `torchrun … -m benchmarks.accuracy.worker JOB.json`."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.accuracy.clips import load
from benchmarks.accuracy.held_out import HeldOut
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import Run
from benchmarks.accuracy.training import Scene, train
from benchmarks.accuracy.variants import VARIANTS, Variant
from benchmarks.schema import decode
from dtrain.dist import process_group
from dtrain.sharding.mesh import MeshConfig, build_mesh

log = logging.getLogger(__name__)

__all__ = ["Job", "finished_runs", "main", "of_study"]


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Args:
        variant: by name.
        settings: of its trainings.
        clips: file that `benchmarks.accuracy.clips.draw` wrote.
        results: file for its runs, written anew after each.
    """

    variant: str
    settings: Settings
    clips: str
    results: str


def of_study(variant: Variant, settings: Settings) -> Variant:
    """A variant with what a study sets for all."""
    return replace(variant, comm=replace(variant.comm, exact_below=settings.exact_below))


def finished_runs(job: Job) -> tuple[Run, ...]:
    """What a worker has written so far."""
    path = Path(job.results)
    runs: tuple[Run, ...] = ()
    if path.exists():
        runs = decode(tuple[Run, ...], json.loads(path.read_text("utf-8")))
    return runs


def main(job_file: str) -> None:
    """Train every seed."""
    job: Job = decode(Job, json.loads(Path(job_file).read_text("utf-8")))
    logging.basicConfig(level=logging.WARNING, format=f"{job.variant}: %(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    variant = of_study(VARIANTS[job.variant], job.settings)
    training, held_out = load(Path(job.clips))
    recipe = job.settings.recipe()
    runs: list[Run] = []
    with process_group() as world:
        mesh = build_mesh(MeshConfig(), world.size, "cpu")
        scene = Scene(job.settings, recipe, training, HeldOut(held_out, job.settings, recipe, mesh), mesh)
        for seed in job.settings.seeds:
            runs.append(train(scene, variant, seed))
            if world.is_main:
                _write(runs, Path(job.results))
                log.info("seed %d: %s", seed, _words(runs[-1]))


def _write(runs: Sequence[Run], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(run) for run in runs], allow_nan=False), "utf-8")
    part.replace(path)  # the launcher reads at any time


def _words(run: Run) -> str:
    losses = ", ".join("not finite" if x is None else f"{x:.5f}" for x in (run.loss, run.ema_loss))
    return f"held-out loss of masters, averages: {losses}; {run.step_ms:.1f} ms a step"


if __name__ == "__main__":
    main(*sys.argv[1:])
