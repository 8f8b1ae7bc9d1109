"""Start torchrun for each variant, keep what has finished.

Ranks that exchange small messages wait more than they compute, so two variants at once fill two cores better
than one; no result depends on it but times. What a variant has finished is in the study's file at once.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.accuracy.clips import draw
from benchmarks.accuracy.compare import compare
from benchmarks.accuracy.settings import Settings
from benchmarks.accuracy.study import SCHEMA_VERSION, Outcome, Study
from benchmarks.accuracy.variants import VARIANTS
from benchmarks.accuracy.worker import Job, finished_runs, of_study
from benchmarks.environment import ROOT, measured_on
from benchmarks.record import write_record

__all__ = ["run_study"]

_POLL_S = 1.0


def run_study(settings: Settings, names: Sequence[str], out: Path, jobs: int) -> Study:
    """Train all variants, `jobs` at a time; write `out`/accuracy.json after every training.

    An interrupt stops the ranks and leaves that file as it is.
    """
    return _Launcher(settings, names, out).run(jobs)


class _Launcher:
    """One study under way."""

    def __init__(self, settings: Settings, names: Sequence[str], out: Path) -> None:
        self._settings, self._out = settings, out
        self._began = time.perf_counter()
        self._faults = dict.fromkeys(names, "not reached")
        self._lock, self._stop = threading.Lock(), threading.Event()
        out.mkdir(parents=True, exist_ok=True)
        self._jobs = {name: self._job(name) for name in names}
        self._study = _begun(settings)

    def _job(self, name: str) -> Job:
        stem = name.replace(", ", "-").replace(" ", "-")
        results = self._out / f"{stem}.runs.json"
        results.unlink(missing_ok=True)  # of a study before
        return Job(name, self._settings, str(self._out / "clips.pt"), str(results))

    def run(self, jobs: int) -> Study:
        draw(self._settings, self._out / "clips.pt")
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(self._train, name) for name in self._jobs]
            try:
                for future in waiting:
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        return self._keep()

    def _train(self, name: str) -> None:
        if self._stop.is_set():
            return
        code = _torchrun(self._jobs[name], self._stop, self._keep)
        finished = len(finished_runs(self._jobs[name]))
        whole = finished == len(self._settings.seeds) and code == 0
        self._faults[name] = "" if whole else f"exit code {code} after {finished} seeds"
        self._keep()

    def _keep(self) -> Study:
        """Write all that has finished."""
        with self._lock:
            outcomes = {name: self._outcome(name) for name in self._jobs}
            self._study = replace(
                self._study,
                outcomes=outcomes,
                comparisons=compare(outcomes),
                seconds=time.perf_counter() - self._began,
            )
            write_record(self._study, self._out / "accuracy.json")
            return self._study

    def _outcome(self, name: str) -> Outcome:
        variant = of_study(VARIANTS[name], self._settings)
        return Outcome(variant.ablation, variant.words(), finished_runs(self._jobs[name]), self._faults[name])


def _begun(settings: Settings) -> Study:
    numels = [p.numel() for p in settings.recipe().build().parameters()]
    return Study(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        parameters=sum(numels),
        compressed=sum(n for n in numels if n >= settings.exact_below) / sum(numels),
        outcomes={},
        comparisons=(),
        seconds=0.0,
        **measured_on("cpu", "benchmarks.accuracy", sys.argv[1:]),
    )


def _torchrun(job: Job, stop: threading.Event, tick: Callable[[], object]) -> int:
    """Run a worker to its end; its exit status. Calls `tick` whenever it has finished one more training."""
    path = Path(job.results).with_suffix(".job")
    path.write_text(json.dumps(asdict(job)), "utf-8")
    ranks = ("--standalone", "--nproc-per-node", str(job.settings.ranks))
    command = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        *ranks,
        "-m",
        "benchmarks.accuracy.worker",
        path,
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    written = None
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            while process.poll() is None and not stop.wait(_POLL_S):
                newest = Path(job.results).stat().st_mtime if Path(job.results).exists() else None
                if newest != written:
                    written = newest
                    tick()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode
