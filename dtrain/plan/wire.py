"""Collectives, as the dispatcher sees them: which, among how many ranks, and what a rank sends.

Bytes that a rank sends, of n for each of W ranks: all-gather n·(W - 1), by a ring; all-to-all and
reduce-scatter of W·n the same; all-reduce of n 2·n·(W - 1)/W.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

__all__ = ["Sent", "sent_by"]


class Sent(NamedTuple):
    """One collective."""

    kind: str
    ranks: int
    wire_bytes: int
    """That this rank sends."""


_KINDS: Mapping[str, tuple[str, Any]] = {
    "_allgather_base_": ("all-gather", lambda ranks, nbytes: nbytes * (ranks - 1)),
    "_reduce_scatter_base_": ("reduce-scatter", lambda ranks, nbytes: nbytes * (ranks - 1) // ranks),
    "alltoall_base_": ("all-to-all", lambda ranks, nbytes: nbytes * (ranks - 1) // ranks),
    "allreduce_": ("all-reduce", lambda ranks, nbytes: 2 * nbytes * (ranks - 1) // ranks),
}


def sent_by(func: Any, args: tuple[Any, ...]) -> Sent | None:
    """What a call of an operator sends; None where it is no collective of bytes."""
    if func.namespace != "c10d" or func._opname not in _KINDS:
        return None
    kind, wire_bytes = _KINDS[func._opname]
    given = args[0] if kind == "all-reduce" else [args[1]]
    nbytes = sum(x.nbytes for x in given if isinstance(x, Tensor))
    group = next(dist.ProcessGroup.unbox(x) for x in args if not isinstance(x, Tensor | list | tuple))
    return Sent(kind, group.size(), wire_bytes(group.size(), nbytes))
