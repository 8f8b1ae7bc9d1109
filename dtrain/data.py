"""Which rank reads which samples, and the loader that reads them ahead of the step.

A run's data is one endless stream of global sample indices 0, 1, 2, …; what index i means (which clip of
which epoch) is the dataset's business. Position is a single integer, so data resumes exactly, on any world.
"""

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtrain.faults.errors import RunFault
from dtrain.faults.signals import ignore_stop_signals
from dtrain.recipe import Batch, DataState

__all__ = [
    "IndexedDataset", "RestartingLoader", "SampleFault",
    "epoch_of", "index_at", "leave_out", "loader", "micro_batch_indices",
]  # fmt: skip

log = logging.getLogger(__name__)

_GONE, _IDLE = "a worker is gone", "DataLoader timed out"
_DEATH_S = 5.0  # until the system tells of it
_POLL_S = 2.0  # that a batch is waited for before the workers are looked at

Ranges = tuple[tuple[int, int], ...]


class SampleFault(RunFault):
    """A sample that no data worker survives."""

    alike = False


class IndexedDataset(Protocol):
    """A map from a global sample index (0, 1, 2, … without end) to a sample."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def micro_batch_indices(rank: int, world: int, state: DataState) -> Iterator[list[int]]:
    """Yield the global sample indices of this rank's micro-batches, for ever.

    Args:
        rank: this rank, 0 <= rank < world.
        world: number of ranks that read data.
        state: where the stream starts and how many samples a rank takes per micro-step.
    """
    start = state.sample + rank * state.micro_batch
    while True:
        yield [index_at(place, state.left_out) for place in range(start, start + state.micro_batch)]
        start += world * state.micro_batch


def index_at(place: int, left_out: Ranges) -> int:
    """The global sample index at a place of the stream; see `DataState`."""
    for start, stop in left_out:
        if place < start:
            break
        place += stop - start
    return place


def leave_out(left_out: Ranges, first: int, last: int) -> Ranges:
    """Leave out what lies between two indices, both included, as well."""
    start, stop = first, last + 1
    apart = []
    for other in left_out:
        if other[1] < start or stop < other[0]:
            apart.append(other)
        else:
            start, stop = min(start, other[0]), max(stop, other[1])
    return tuple(sorted([*apart, (start, stop)]))


def epoch_of(index: int, length: int) -> tuple[int, int]:
    """Split a global sample index into (epoch, position within the epoch) for a dataset of `length` items."""
    return divmod(index, length)


class _IndexSampler(Sampler[list[int]]):
    def __init__(self, rank: int, world: int, state: DataState) -> None:
        self._arguments = (rank, world, state)

    def __iter__(self) -> Iterator[list[int]]:
        return micro_batch_indices(*self._arguments)


def loader(
    dataset: IndexedDataset,
    rank: int,
    world: int,
    state: DataState,
    *,
    workers: int,
    collate: Callable[[list[dict[str, Any]]], Batch],
    prefetch: int = 2,
    stall_s: float = 120.0,
    restarts: int = 3,
) -> "RestartingLoader":
    """Read micro-batches of `dataset` in worker processes, in order and ahead of the training step.

    Workers that die, or give nothing for `stall_s`, are started again where they stood; no sample is lost.

    Args:
        dataset: picklable, reads one sample per global index; must not touch CUDA.
        rank, world, state: which samples, see `micro_batch_indices`.
        workers: worker processes; 0 reads in the calling process.
        collate: makes a batch of B samples.
        prefetch: micro-batches each worker keeps ready.
        stall_s: after which a worker that gives no batch is taken for hung; less than `faults.hang_s`, or
            the others' watchdogs end the run first.
        restarts: for one micro-batch, before that is an error.
    """

    def start(state: DataState, careful: bool) -> DataLoader[Batch]:
        return DataLoader(
            _EndlessDataset(dataset),
            batch_sampler=_IndexSampler(rank, world, state),
            num_workers=min(workers, 1) if careful else workers,
            collate_fn=collate,
            pin_memory=state.device.startswith("cuda"),
            prefetch_factor=(1 if careful else prefetch) if workers else None,
            persistent_workers=False,
            # A fork would copy locks that gloo's, NCCL's and the decoder's threads may hold at that moment.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_begin_worker if workers else None,
            timeout=min(_POLL_S, stall_s) if workers else 0,
        )

    return RestartingLoader(start, rank, world, state, restarts, workers * prefetch, stall_s)


class RestartingLoader(Iterable[Batch]):
    """Micro-batches of a loader whose workers may die.

    After a failure one worker reads one micro-batch at a time, until all that was read ahead is behind: so
    the samples that it does not survive are known.

    Args:
        start: makes the loader of what comes from a state on, or a careful one that reads nothing ahead.
        rank, world, state: see `loader`.
        restarts: for one micro-batch, before that is an error.
        ahead: micro-batches that are read ahead.
        stall_s: see `loader`.
    Attributes:
        restarted: how often workers were started again.
    """

    def __init__(
        self,
        start: Callable[[DataState, bool], Iterable[Batch]],
        rank: int,
        world: int,
        state: DataState,
        restarts: int,
        ahead: int,
        stall_s: float,
    ) -> None:
        self._ahead, self._stall_s = ahead, stall_s
        self._start, self._rank, self._world, self._state = start, rank, world, state
        self._most = restarts
        self.restarted = 0

    def __iter__(self) -> Iterator[Batch]:
        state, tries, careful = self._state, 0, 0
        batches = _Workers(self._start(state, False), self._stall_s)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not _is_of_workers(error):
                    raise
                batches.kill()
                tries += 1
                self._say(error, next(micro_batch_indices(self._rank, self._world, state)), tries)
                self.restarted += 1
                careful = self._ahead
                batches = _Workers(self._start(state, True), self._stall_s)
                continue
            yield {**batch, "worker_restarts": tries} if tries else batch
            state, tries = replace(state, sample=state.sample + self._world * state.micro_batch), 0
            if careful:
                careful -= 1
                if not careful:
                    batches = _Workers(self._start(state, False), self._stall_s)

    def _say(self, error: RuntimeError, samples: Sequence[int], tries: int) -> None:
        what = f"rank {self._rank}: data workers failed before samples {samples[0]} to {samples[-1]}: {error}"
        if tries > self._most:
            raise SampleFault(f"{what}, {tries} times: one of these samples kills or stalls its reader")
        # An error, though it is mended: of other ranks than the first nothing else is heard.
        log.error("%s; they are started again (%d of %d)", what, tries, self._most)


class _Workers(Iterator[Batch]):
    """A loader's iterator, and its processes."""

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
        """They are told to ignore gentler signals."""
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


def _is_of_workers(error: RuntimeError) -> bool:
    """Whether PyTorch says that a worker is gone or gives nothing, not what one of them raised."""
    return str(error).startswith(("DataLoader worker (pid", _IDLE, _GONE))


class _EndlessDataset(Dataset[dict[str, Any]]):
    """Gives an IndexedDataset the type that DataLoader asks for."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def _begin_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    ignore_stop_signals()
