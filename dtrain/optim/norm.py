"""The norm of all gradients of all ranks.

    |g| = sqrt(Σ over parameters and shards of |g_i|²)

PyTorch forms it in the gradients' dtype and on their device. In bf16 that leaves a norm eight bits, and on
the host it needs a collective of the CPU: such gradients are squared in fp32, and summed where the mesh is.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from dtrain.sharding.local import local_part

__all__ = ["gradient_norm"]

_Place = tuple[DeviceMesh, tuple[Placement, ...]] | None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients of all ranks as one vector: an fp32 scalar on the device that computes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if all(_suits_pytorch(grad) for grad in grads):
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    placed: dict[_Place, list[Tensor]] = defaultdict(list)
    for grad in grads:
        placed[_place(grad)].append(local_part(grad))
    return torch.stack([_squares(place, parts) for place, parts in placed.items()]).sum().sqrt().float()


def _suits_pytorch(grad: Tensor) -> bool:
    place = _place(grad)
    return grad.dtype == torch.float32 and (place is None or place[0].device_type == grad.device.type)


def _place(grad: Tensor) -> _Place:
    return (grad.device_mesh, tuple(grad.placements)) if isinstance(grad, DTensor) else None


def _squares(place: _Place, parts: list[Tensor]) -> Tensor:
    """The sum of squares of gradients that are placed alike, over all ranks of their mesh."""
    mine = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).double().square().sum()
    if place is None:
        return mine
    mesh, placements = place
    sums = [Partial() if isinstance(p, Shard) else p for p in placements]
    whole: Tensor = DTensor.from_local(mine.to(mesh.device_type), mesh, sums, run_check=False).full_tensor()
    return whole
