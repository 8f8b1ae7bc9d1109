"""Where a run took place: device, versions, commit; and how fast this device really computes and copies."""

import functools
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.record import Device

ROOT = Path(__file__).parent.parent

_CYCLES_PER_MS = 2_000_000  # of a GPU, roughly


def measured_on(kind: Literal["cpu", "cuda"], program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of a `benchmarks.record.Measured`, as of now.

    Args:
        kind: of device.
        program, arguments: what was called, `python -m program arguments…`.
    """
    return origin(program, arguments) | {"device": describe_device(kind)}


def origin(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of a `benchmarks.record.Origin`, as of now; see `measured_on`."""
    commit, dirty = git_state()
    return {
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", program, *arguments]),
    }


def describe_device(kind: Literal["cpu", "cuda"]) -> Device:
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Device(kind, properties.name, torch.cuda.device_count(), properties.total_memory)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(kind, _cpu_name(), cores, memory_bytes)


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _package("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); recorded results do not count as a difference.

    A copy without git's folder takes the commit from the environment variable GIT_COMMIT, if it is there.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT") or None, None
    return commit, bool(status)


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def seconds(call: Callable[[], object], kind: str, cold: bool = False, queue_ms: float = 1.0) -> float:
    """Time of one call: wall clock on the CPU, device events on CUDA, where launches return early.

    Args:
        cold: on CUDA, overwrite the cache first, and keep the device busy while the host queues the call, so
            that its launches cost nothing. For work of a few kernels.
        queue_ms: how long it is kept busy: as long as the host takes at most; a backward pass by default.
    """
    if kind == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            _cache_filler().zero_()
            torch.cuda._sleep(int(queue_ms * _CYCLES_PER_MS))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@functools.cache
def _cache_filler() -> torch.Tensor:
    """More bytes than any GPU's cache holds."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def measured_rates(kind: Literal["cpu", "cuda"], dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy): the best of several tries each.

    Measured instead of read off a data sheet, so that a floor is one for this machine with its threads.
    """
    size = 8192 if kind == "cuda" else 1024
    a = torch.randn(size, size, device=kind).to(dtype)
    source = torch.ones(2**28 if kind == "cuda" else 2**25, device=kind)  # 1 GiB, 128 MiB: larger than caches
    target = torch.empty_like(source)
    product_s = min(seconds(lambda: a @ a, kind) for _ in range(8))
    copy_s = min(seconds(lambda: target.copy_(source), kind) for _ in range(8))
    return 2 * size**3 / product_s, 2 * source.nbytes / copy_s
