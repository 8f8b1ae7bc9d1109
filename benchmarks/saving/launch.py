"""Starting `worker` under torchrun, once a world size."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.saving.job import Job
from benchmarks.saving.records import RankRecord
from benchmarks.schema import decode

__all__ = ["ENVIRONMENT", "RanksFailed", "filesystem_of", "run_job"]

ENVIRONMENT: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}
"""What all ranks run under. The allocator stays as it is: what a save allocates is part of its cost."""


class RanksFailed(RuntimeError):
    """torchrun ended with an error; shows the end of its log."""


def run_job(job: Job, ranks: int) -> list[RankRecord]:
    """Run `worker` on so many ranks of this machine and return what each recorded.

    Args:
        job: what to measure; its folder gets the log, its checkpoints are removed.
        ranks: processes.
    Raises:
        RanksFailed: one of them did.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("rank*.json"):
        old.unlink()
    file = out / "job.json"
    file.write_text(json.dumps(asdict(job)), "utf-8")
    try:
        _torchrun(ranks, file.resolve(), out / "ranks.log")
    finally:
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    return [decode(RankRecord, json.loads((out / f"rank{r}.json").read_text("utf-8"))) for r in range(ranks)]


def _torchrun(ranks: int, job_file: Path, log: Path) -> None:
    command = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "benchmarks.saving.worker", str(job_file),
    )  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            process.wait()
        finally:
            process.terminate()  # an interrupt: torchrun ends its workers
    if process.returncode:
        raise RanksFailed(
            f"{ranks} ranks ended with status {process.returncode}; {log} ends:\n{log.read_text()[-3000:]}"
        )


def filesystem_of(folder: Path) -> str:
    """Kind of the file system that a folder lies on, from /proc/self/mounts; "unknown" without it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    places = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    around = [place for place in places if folder.resolve().is_relative_to(place[0])]
    return max(around, key=lambda place: len(place[0]), default=("", "unknown"))[1]
