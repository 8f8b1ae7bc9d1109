"""Which rank reads which samples.

A run's data is one endless stream of global sample indices 0, 1, 2, …; what index i means (which clip of
which epoch) is the dataset's business. Position is a single integer, so data resumes exactly, on any world.
"""

from collections.abc import Iterator

from dtrain.recipe import DataState

__all__ = ["Ranges", "epoch_of", "index_at", "leave_out", "micro_batch_indices"]

Ranges = tuple[tuple[int, int], ...]


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
