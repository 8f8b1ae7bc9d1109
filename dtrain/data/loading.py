"""Reading samples ahead of the training step, in worker processes that are started again where one fails."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtrain.data.stream import micro_batch_indices
from dtrain.data.workers import POLL_S, Workers, is_of_workers
from dtrain.faults.errors import RunFault
from dtrain.faults.signals import ignore_stop_signals
from dtrain.recipe import Batch, DataState

__all__ = ["IndexedDataset", "RestartingLoader", "SampleFault", "loader"]

log = logging.getLogger(__name__)


class SampleFault(RunFault):
    """A sample that no data worker survives."""

    alike = False


class IndexedDataset(Protocol):
    """A map from a global sample index (0, 1, 2, … without end) to a sample."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


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
            timeout=min(POLL_S, stall_s) if workers else 0,
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
        batches = Workers(self._start(state, False), self._stall_s)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not is_of_workers(error):
                    raise
                batches.kill()
                tries += 1
                self._say(error, next(micro_batch_indices(self._rank, self._world, state)), tries)
                self.restarted += 1
                careful = self._ahead
                batches = Workers(self._start(state, True), self._stall_s)
                continue
            yield {**batch, "worker_restarts": tries} if tries else batch
            state, tries = replace(state, sample=state.sample + self._world * state.micro_batch), 0
            if careful:
                careful -= 1
                if not careful:
                    batches = Workers(self._start(state, False), self._stall_s)

    def _say(self, error: RuntimeError, samples: Sequence[int], tries: int) -> None:
        what = f"rank {self._rank}: data workers failed before samples {samples[0]} to {samples[-1]}: {error}"
        if tries > self._most:
            raise SampleFault(f"{what}, {tries} times: one of these samples kills or stalls its reader")
        # An error, though it is mended: of other ranks than the first nothing else is heard.
        log.error("%s; they are started again (%d of %d)", what, tries, self._most)


class _IndexSampler(Sampler[list[int]]):
    def __init__(self, rank: int, world: int, state: DataState) -> None:
        self._arguments = (rank, world, state)

    def __iter__(self) -> Iterator[list[int]]:
        return micro_batch_indices(*self._arguments)


class _EndlessDataset(Dataset[dict[str, Any]]):
    """Gives an IndexedDataset the type that DataLoader asks for."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def _begin_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    ignore_stop_signals()
