"""Which rank reads which samples, and the loader that reads them ahead of the step.

A run's data is one endless stream of global sample indices 0, 1, 2, …; what index i means (which clip of
which epoch) is the dataset's business. Position is a single integer, so data resumes exactly, on any world.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dtrain.faults.signals import ignore_stop_signals
from dtrain.recipe import Batch, DataState


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
        yield list(range(start, start + state.micro_batch))
        start += world * state.micro_batch


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
) -> DataLoader[Batch]:
    """Read micro-batches of `dataset` in worker processes, in order and ahead of the training step.

    Args:
        dataset: picklable, reads one sample per global index; must not touch CUDA.
        rank, world, state: which samples, see `micro_batch_indices`.
        workers: worker processes; 0 reads in the calling process.
        collate: makes a batch of B samples.
        prefetch: micro-batches each worker keeps ready.
    """
    return DataLoader(
        _EndlessDataset(dataset),
        batch_sampler=_IndexSampler(rank, world, state),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=state.device.startswith("cuda"),
        prefetch_factor=prefetch if workers else None,
        persistent_workers=False,
        # A fork would copy locks that gloo's, NCCL's and the decoder's threads may hold at that moment.
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_begin_worker if workers else None,
    )


class _EndlessDataset(Dataset[dict[str, Any]]):
    """Gives an IndexedDataset the type that DataLoader asks for."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


def _begin_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    ignore_stop_signals()
