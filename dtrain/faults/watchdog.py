"""A rank that hangs is named, with its step, its stack and the collective that the others wait for.

Where a rank makes no progress for a while, so do all: they wait for it. A thread on each then tells the
others, through the store of the process group, where its rank is, and the lowest rank that still speaks says
who is behind: who gives no sign at all, or has begun fewer collectives than the others. Then all end with
exit status 75, and torchrun starts them again (`--max-restarts`) or ends the job: nobody waits for ever.

Collectives are those of PyTorch's flight recorder.
Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from dtrain.dist import World, attempt

__all__ = ["EXIT_STATUS", "Report", "Watchdog", "who_is_behind"]

log = logging.getLogger(__name__)

EXIT_STATUS = 75  # of sysexits.h: a failure that another try may not meet
_GRACE_S = 5.0  # that ranks have to report once the first one does


@dataclass(frozen=True)
class Report:
    """Where a rank is that makes no progress."""

    step: int
    """That it works on, counted from 1."""
    doing: str
    idle_s: float
    """Since it came there."""
    begun: Mapping[str, int]
    """Collectives by process group, finished or not."""
    pending: tuple[str, ...]
    """Of them those that are not finished."""
    stack: str
    """Of the main thread."""


class Watchdog:
    """Watches this rank's main thread while it is entered.

    Args:
        world: this rank's place.
        patience_s: without progress, until it reports; 0 never does.
        folder: for the stacks of all ranks, `hang-STEP/rank-R.txt`.
    """

    def __init__(self, world: World, patience_s: float, folder: Path) -> None:
        self._world, self._patience_s, self._folder = world, patience_s, folder
        self._place = (0, "starts", time.monotonic(), patience_s)
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dtrain-watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._patience_s:
            self._store = _own_store(self._world)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, step: int, doing: str, patience_s: float | None = None) -> None:
        """The main thread has come here.

        Args:
            step: that it works on, counted from 1.
            doing: such as "waits for data".
            patience_s: for this alone, where it may take longer than anything else.
        """
        self._place = (step, doing, time.monotonic(), patience_s or self._patience_s)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._patience_s / 10)):
            _, _, since, patience_s = self._place
            if time.monotonic() - since > patience_s:
                self._report()
                return

    def _report(self) -> None:
        step, doing, since, _ = self._place
        try:
            begun, pending = _collectives()
        except Exception as error:  # another version's records; the stack matters more
            begun, pending = {}, (f"unknown: {error!r}",)
        frame = sys._current_frames().get(self._main or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        mine = Report(step, doing, round(time.monotonic() - since, 1), begun, pending, stack)
        try:
            self._tell(mine)
        except Exception as error:  # the store is gone with the rank that kept it
            log.error("rank %d: %s; the others cannot be asked: %s", self._world.rank, _words(mine), error)
            sys.stderr.write(stack)
        finally:
            sys.stderr.flush()
            os._exit(EXIT_STATUS)

    def _tell(self, mine: Report) -> None:
        rank, size = self._world.rank, self._world.size
        self._store.set(str(rank), json.dumps(asdict(mine)))
        time.sleep(_GRACE_S)
        found = {
            other: Report(**json.loads(self._store.get(str(other))))
            for other in range(size)
            if self._store.check([str(other)])
        }
        folder = self._folder / f"hang-{max(report.step for report in found.values()):08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.txt").write_text(_page(rank, mine), "utf-8")
        if rank == min(found):
            for line in _said(found, size, folder):
                log.error("%s", line)
            self._store.set("said", "")
        else:
            time.sleep(_GRACE_S)  # the first to exit ends them all


def _own_store(world: World) -> Any:
    """The store of the process group by a connection of its own: the main thread may wait in the other."""
    if world.size == 1:
        return HashStore()
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"hang-{attempt()}", store)


def _collectives() -> tuple[dict[str, int], tuple[str, ...]]:
    """Begun, by process group, and pending, in words, as far as this PyTorch records them."""
    begun: dict[str, int] = {}
    pending = []
    recorder: Any = _distributed_c10d
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    dump = next((getattr(recorder, name) for name in names if hasattr(recorder, name)), lambda: "{}")
    for entry in json.loads(dump()).get("entries", ()):
        name, group = entry["profiling_name"], " ".join(filter(None, entry["process_group"]))
        begun[group] = max(begun.get(group, 0), entry["collective_seq_id"])
        if not entry["retired"]:
            sizes = ", ".join(str(tuple(size)) for size in entry["input_sizes"])
            pending.append(f"{name} {entry['collective_seq_id']} of {sizes} in group {group}")
    return begun, tuple(pending)


def who_is_behind(reports: Mapping[int, Report], size: int) -> list[int]:
    """Ranks that the others wait for.

    Args:
        reports: of those ranks that gave one.
        size: ranks of the run.
    """
    if silent := sorted(set(range(size)) - set(reports)):
        return silent
    most: dict[str, int] = {}
    for report in reports.values():
        for group, count in report.begun.items():
            most[group] = max(most.get(group, 0), count)
    return [
        rank
        for rank, report in sorted(reports.items())
        if any(report.begun[group] < most[group] for group in report.begun)
        or report.step < max(other.step for other in reports.values())
    ]


def _said(reports: Mapping[int, Report], size: int, folder: Path) -> list[str]:
    behind = who_is_behind(reports, size)
    lines = [f"hang: no progress; stacks of all ranks are in {folder}"]
    for rank in behind:
        if rank in reports:
            lines += [f"hang: rank {rank} is behind: {_words(reports[rank])}", reports[rank].stack.rstrip()]
        else:
            lines.append(f"hang: rank {rank} gives no sign: stopped, or its host is gone")
    if not behind:
        lines.append("hang: no rank is behind the others")
    waiting = {rank: report for rank, report in reports.items() if rank not in behind}
    lines += [f"hang: rank {rank} {_words(report)}" for rank, report in list(waiting.items())[:4]]
    return lines + ([f"hang: and {len(waiting) - 4} more"] if len(waiting) > 4 else [])


def _words(report: Report) -> str:
    pending = f", pending: {report.pending[0]}" if report.pending else ", no collective is pending"
    return f"{report.doing} of step {report.step} for {report.idle_s:.0f} s{pending}"


def _page(rank: int, report: Report) -> str:
    return f"rank {rank}: {_words(report)}\n{report.stack}\n" + "".join(f"{p}\n" for p in report.pending)
