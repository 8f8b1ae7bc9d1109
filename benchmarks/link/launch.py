"""Starting `worker` in every host, and waiting for all of it.

One torchrun a host, one rank each, as on a cluster without a scheduler; gloo over the host's interface. When
one fails, the others are ended and the end of its log is shown.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.link.hosts import INTERFACE, Hosts
from benchmarks.link.records import RankRecord
from benchmarks.link.workload import Job
from benchmarks.schema import decode

__all__ = ["ENVIRONMENT", "HostFailed", "run_job"]

ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    # Memory that is freed stays with the process and is used again: fresh pages cost a fault each, at 0.5 G
    # elements a second, which GPUs with their caching allocator do not know.
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
    "GLOO_SOCKET_IFNAME": INTERFACE,
}
"""What all ranks and all variants run under."""

_PORT = 29400


class HostFailed(RuntimeError):
    """A host's process ended with an error; says which, and the end of its log."""


def run_job(job: Job, hosts: Hosts, environment: Mapping[str, str]) -> list[RankRecord]:
    """Run `worker` on all hosts and return what each rank recorded.

    Args:
        job: what to measure; its folder is made, and gets the logs of the hosts.
        environment: of the processes, besides `ENVIRONMENT`.
    Raises:
        HostFailed: one of them did.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("rank*.json"):
        old.unlink()
    file = out / "job.json"
    file.write_text(json.dumps(asdict(job)))
    with ExitStack() as stack:
        running = []
        for host in range(hosts.count):
            log = stack.enter_context((out / f"host{host}.log").open("w"))
            command = (
                sys.executable, "-m", "torch.distributed.run",
                "--nnodes", str(hosts.count), "--node-rank", str(host), "--nproc-per-node", "1",
                "--master-addr", hosts.address(0), "--master-port", str(_PORT),
                "-m", "benchmarks.link.worker", str(file.resolve()),
            )  # fmt: skip
            env = {**environment, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
            running.append(
                hosts.popen(host, command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            )
        _wait(running, out)
    return [
        decode(RankRecord, json.loads((out / f"rank{rank}.json").read_text())) for rank in range(hosts.count)
    ]


def _wait(running: list["subprocess.Popen[str]"], out: Path) -> None:
    try:
        while any(process.poll() is None for process in running):
            _check(running, out)
            time.sleep(0.2)
        _check(running, out)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()  # torchrun ends its worker
        for process in running:
            process.wait(timeout=60)


def _check(running: list["subprocess.Popen[str]"], out: Path) -> None:
    for host, process in enumerate(running):
        if process.poll():
            log = out / f"host{host}.log"
            raise HostFailed(
                f"host {host} failed with status {process.returncode}; its log, {log}, ends:\n"
                f"{log.read_text()[-3000:]}"
            )
