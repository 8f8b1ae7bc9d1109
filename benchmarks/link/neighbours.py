"""What else this machine did during a measurement: CPU that others took, and waits for memory.

    others = (Δ user, nice and system time of all CPUs − Δ CPU time of our children) / (Δ time of all CPUs)

The kernel's own work for the network (softirq) belongs to neither. Sources: proc_stat(5), and the kernel's
Documentation/accounting/psi.rst.
"""

import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Neighbours", "available_bytes", "watch_neighbours"]


class Neighbours(NamedTuple):
    """Of the time between two looks.

    Args:
        cpu_share: of the machine's CPU time, what went to processes other than our children.
        memory_stall_s: how long some process waited for memory; None where the kernel does not tell.
    """

    cpu_share: float
    memory_stall_s: float | None


def watch_neighbours() -> Callable[[], Neighbours]:
    """Begin to watch; the function returned tells what has happened since. Children count once waited for."""
    begun, busy, ours, stalled = time.perf_counter(), _busy_s(), _children_s(), _stalled_s()

    def told() -> Neighbours:
        whole = (time.perf_counter() - begun) * (os.cpu_count() or 1)
        others = max(0.0, _busy_s() - busy - (_children_s() - ours)) / whole
        now = _stalled_s()
        return Neighbours(others, None if now is None or stalled is None else now - stalled)

    return told


def available_bytes() -> int:
    """Memory that new processes can have without others giving any up."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _busy_s() -> float:
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stalled_s() -> float | None:
    with suppress(OSError):
        some = Path("/proc/pressure/memory").read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    return None
