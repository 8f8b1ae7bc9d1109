"""Which block keeps what, so that the least is computed again within a budget of bytes: exact.

    minimise Σ work(option of block b)   such that   Σ bytes(option of block b) ≤ budget
    work = FLOPs + 200 · bytes that operators without FLOPs write

A GPU does some 200 FLOPs in the time that a byte takes through its memory (A100 156, H100 295, both in bf16):
without that term a block would rather run all its norms again than keep everything.

It is a knapsack with one choice a block. Of sums with equal or fewer bytes only those with less work can be
part of a best choice, so blocks are added one by one, and after each only the front of undominated sums is
kept (Nemhauser and Ullmann, 1969, https://doi.org/10.1287/mnsc.15.9.494). Within a block the same: every
subset of its operators is an option.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dtrain.activations.selective import OpInstance

__all__ = ["FLOPS_A_BYTE", "Op", "Option", "options", "richer_last", "solve"]

FLOPS_A_BYTE = 200

_Array = npt.NDArray[np.int64]


class Op(NamedTuple):
    """A call of an operator whose output may be kept."""

    call: OpInstance
    bytes: int
    flops: int


class Option(NamedTuple):
    """What a block may keep: bytes between its passes, and what is computed again.

    Args:
        work: see the module; FLOPs are a part of it.
        saved: calls of operators whose outputs are kept; None is everything that autograd keeps.
    """

    bytes: int
    flops: int
    work: int
    saved: tuple[OpInstance, ...] | None


def options(ops: Sequence[Op], flops: int, pass_bytes: int, everything_bytes: int) -> list[Option]:
    """The undominated options of a block, by rising bytes; the first keeps nothing.

    Args:
        ops: what may be kept; FLOPs within `flops`.
        flops: computed again where nothing is kept.
        pass_bytes: written again, by operators without FLOPs, unless everything is kept.
        everything_bytes: kept where nothing is computed again.
    """
    front = [Option(0, flops, flops + FLOPS_A_BYTE * pass_bytes, ())]
    for op in ops:
        front = _front(front + [_with(option, op) for option in front])
    return _front([Option(everything_bytes, 0, 0, None), *front])


def _with(option: Option, op: Op) -> Option:
    saved = (*(option.saved or ()), op.call)
    return Option(option.bytes + op.bytes, option.flops - op.flops, option.work - op.flops, saved)


def _front(candidates: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(candidates, key=lambda o: (o.bytes, o.work)):  # stable: of equals the first
        if not kept or option.work < kept[-1].work:
            kept.append(option)
    return kept


def solve(fronts: Sequence[Sequence[Option]], budget_bytes: int) -> list[int]:
    """For each block the index of its option: the least work within the budget, of equals the fewest bytes.

    Args:
        fronts: of each block its options; the first keeps the least and must fit.
    """
    sums = np.zeros(1, np.int64), np.zeros(1, np.int64)
    trace: list[tuple[_Array, _Array]] = []
    for front in fronts:
        own = np.array([o.bytes for o in front], np.int64), np.array([o.work for o in front], np.int64)
        sums, parents, taken = _merge(sums, own, budget_bytes)
        trace.append((parents, taken))
    place, chosen = len(sums[0]) - 1, []
    for parents, taken in reversed(trace):
        chosen.append(int(taken[place]))
        place = int(parents[place])
    return chosen[::-1]


def _merge(
    sums: tuple[_Array, _Array], own: tuple[_Array, _Array], budget_bytes: int
) -> tuple[tuple[_Array, _Array], _Array, _Array]:
    """The front of all sums with one more block, and of each whence it comes and which option it took."""
    all_bytes, all_work = ((a[:, None] + b).ravel() for a, b in zip(sums, own, strict=True))
    order = np.lexsort((all_work, all_bytes))
    order = order[all_bytes[order] <= budget_bytes]
    work = all_work[order]
    before = np.minimum.accumulate(np.concatenate([[np.iinfo(np.int64).max], work[:-1]]))
    order = order[work < before]
    parents, taken = np.divmod(order, len(own[0]))
    return (all_bytes[order], all_work[order]), parents, taken


def richer_last(chosen: Sequence[int], kinds: Sequence[Hashable]) -> list[int]:
    """The same choice with blocks of a kind exchanged: those that run last keep the most.

    What a late block keeps lives shortest. And in its backward pass it would be there anyhow: while the last
    block runs backwards, computed again or kept is the same memory, and no gradient is waiting yet.
    """
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    result = list(chosen)
    for members in places.values():
        for place, option in zip(members, sorted(chosen[m] for m in members), strict=True):
            result[place] = option
    return result
