"""The processes in which a DataLoader reads, some of which die or stall: seen soon, and in nobody's way."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

from dtrain.recipe import Batch

__all__ = ["POLL_S", "Workers", "is_of_workers"]

POLL_S = 2.0  # that a batch is waited for before the workers are looked at
_DEATH_S = 5.0  # until the system tells of it
_GONE, _IDLE = "a worker is gone", "DataLoader timed out"


class Workers(Iterator[Batch]):
    """The batches of a DataLoader, and the processes that read them.

    `next` raises RuntimeError where one of them is gone or gives nothing, see `is_of_workers`.

    Args:
        batches: a DataLoader with a short timeout, `POLL_S`.
        stall_s: after which workers that give no batch are taken for hung.
    """

    def __init__(self, batches: Iterable[Batch], stall_s: float) -> None:
        self._stall_s = stall_s
        before = set(multiprocessing.active_children())
        # PyTorch's handler would raise in the middle of a step; a dead worker is seen at the next batch too.
        handler = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(batches)
        if handler is not None and multiprocessing.current_process().name == "MainProcess":
            signal.signal(signal.SIGCHLD, handler)
        self._processes = set(multiprocessing.active_children()) - before
        if self._processes:
            workers: Any = self._batches
            workers._workers_done_event = _End(workers._workers_done_event)

    def __next__(self) -> Batch:
        since = time.monotonic()
        while True:
            try:
                return self._poll()
            except RuntimeError as error:  # PyTorch looks for dead workers only where it has waited in vain
                idle_s = time.monotonic() - since
                if not str(error).startswith(_IDLE):
                    raise
                if idle_s > self._stall_s:
                    raise RuntimeError(f"{_IDLE} after {idle_s:.0f} s") from error

    def _poll(self) -> Batch:
        try:
            return next(self._batches)
        except (OSError, EOFError) as error:  # of a batch whose memory its worker did not live to hand over
            if not connection.wait([process.sentinel for process in self._processes], _DEATH_S):
                raise
            raise RuntimeError(f"{_GONE}: {error!r}") from error

    def kill(self) -> None:
        """At once: they are told to ignore gentler signals."""
        for process in self._processes:
            process.kill()
        # Clearing up, PyTorch may wait for ever for what one of them has written half.
        workers: Any = self._batches
        threading.Thread(target=workers._shutdown_workers, name="dtrain-dead-workers", daemon=True).start()


class _End:
    """The event by which PyTorch tells workers to end, as the main process sees it.

    A worker that dies while it looks at the event keeps its lock, for which PyTorch would wait for ever.
    """

    def __init__(self, event: Any) -> None:
        self._event, self._is_set = event, False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        threading.Thread(target=self._event.set, name="dtrain-end-workers", daemon=True).start()


def is_of_workers(error: RuntimeError) -> bool:
    """Whether PyTorch says that a worker is gone or gives nothing, not what one of them raised."""
    return str(error).startswith(("DataLoader worker (pid", _IDLE, _GONE))
