"""The three collectives that are used, on flat tensors, by the names that each torch version has for them."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_to_all", "reduce_scatter"]

# torch 2.13 renamed them and warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(out: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `out` with every rank's `mine`, in the order of ranks; any shapes, `out` W times as large."""
    _all_gather(out.view(-1), mine.view(-1), group=group)


def all_to_all(out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    """Send the r-th of W equal parts of `rows` to rank r; part r of `out` is what rank r sent."""
    dist.all_to_all_single(out.view(-1), rows.view(-1), group=group)


def reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    """Write the sum over ranks of this rank's of W equal parts of `rows`, as the backend forms it."""
    _reduce_scatter(out.view(-1), rows.view(-1), group=group)
