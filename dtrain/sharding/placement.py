"""Along which dim FSDP2 cuts a parameter.

FSDP2 cuts dim 0 and pads it to a multiple of the ranks. What has one row, such as a table of positions
(1, N, D), would lie whole on the first rank and be gathered as W tables on W ranks. Along another dim it is
cut without padding, if the ranks divide that dim: FSDP2 takes no other
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html, `shard_placement_fn`).

A cut along another dim costs a copy on each way, as FSDP2's buffers hold a rank's part in one piece; so what
is small stays with dim 0.
"""

import math

from torch import Tensor
from torch.distributed.tensor import Shard

__all__ = ["placement", "shard_numel"]

_LARGE = 2**14  # elements


def placement(parameter: Tensor, ranks: int) -> Shard:
    """How a parameter is cut among `ranks`: by its shape alone, so that all ranks agree.

    Along dim 0; a large one of one row along the first dim that the ranks divide, if there is one.
    """
    shape = parameter.shape
    if ranks > 1 and parameter.dim() > 1 and shape[0] == 1 and parameter.numel() >= _LARGE:
        return Shard(next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0))
    return Shard(0)


def shard_numel(parameter: Tensor, ranks: int) -> int:
    """Elements of the largest part, that of the first rank; FSDP2 pads all others to it."""
    if not parameter.dim():
        return 1
    size = parameter.shape[placement(parameter, ranks).dim]
    return math.ceil(size / ranks) * (parameter.numel() // size) if size else 0
