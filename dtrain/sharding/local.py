"""A rank's own part of a parameter, and where it lies in the whole.

Parameters are plain tensors, or DTensors that are cut along one dim and copied over replicas. What is rounded
by chance takes its bits from the place in the whole, so that it does not depend on how a parameter is cut.
"""

from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dtrain.kernels.rounding import Runs

__all__ = ["first_row", "local_part", "runs"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part: a view of a DTensor, a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(parameter: Tensor) -> int:
    """Index along dim 0 of the whole parameter at which this rank's rows start.

    Raises:
        ValueError: the parameter is sharded along another dim.
    """
    cut = _cut(parameter)
    if cut.dim:
        raise ValueError(
            f"a parameter {tuple(parameter.shape)} is sharded along dim {cut.dim}: moments of eight bits "
            'need dim 0; or set moments = "fp32"'
        )
    return cut.start


def runs(parameter: Tensor) -> Runs:
    """Places of this rank's elements, in their order, among those of the whole parameter.

    Raises:
        ValueError: the parameter is sharded along several dims, or placed otherwise.
    """
    cut = _cut(parameter)
    inner = parameter.shape[cut.dim + 1 :].numel()
    pitch = inner * parameter.shape[cut.dim] if parameter.dim() else 1
    return Runs(cut.start * inner, cut.size * inner, pitch)


class _Cut(NamedTuple):
    """A rank has `size` indices of a dim, from `start` on."""

    dim: int
    start: int
    size: int


def _cut(parameter: Tensor) -> _Cut:
    if not isinstance(parameter, DTensor):
        return _Cut(0, 0, parameter.shape[0] if parameter.dim() else 1)
    sharded = {p.dim for p in parameter.placements if type(p) is Shard}
    if len(sharded) > 1 or not all(type(p) in (Shard, Replicate) for p in parameter.placements):
        raise ValueError(
            f"a parameter is placed as {parameter.placements}: must be Shard along one dim, or Replicate()"
        )
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the parameter's mesh"
    dim = sharded.pop() if sharded else 0
    start, size = 0, parameter.shape[dim] if parameter.dim() else 1
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            chunk = -(-size // parameter.device_mesh.size(axis))
            before = min(size, chunk * coordinate[axis])
            start, size = start + before, min(chunk, size - before)
    return _Cut(dim, start, size)
