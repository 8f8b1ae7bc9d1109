"""A rank's own part of a parameter, and where it lies in the whole.

Parameters are plain tensors, or DTensors that are cut along dim 0 and copied over replicas. What is rounded
by chance takes its bits from the place in the whole, so that it does not depend on how a parameter is cut.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["first_row", "local_part"]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows: a view of a DTensor, a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(parameter: Tensor) -> int:
    """Index along dim 0 of the whole parameter at which this rank's rows start.

    Raises:
        ValueError: the parameter is not sharded along dim 0 alone.
    """
    first, rows = 0, parameter.shape[0] if parameter.dim() else 1
    if not isinstance(parameter, DTensor):
        return first
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the parameter's mesh"
    for axis, placement in enumerate(parameter.placements):
        if type(placement) is Shard and placement.dim == 0:
            chunk = -(-rows // parameter.device_mesh.size(axis))
            start = min(rows, chunk * coordinate[axis])
            first, rows = first + start, min(chunk, rows - start)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"a parameter is placed as {placement}: must be Shard(dim=0) or Replicate()")
    return first
