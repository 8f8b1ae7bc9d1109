"""What compressed collectives remember, for a checkpoint: residuals and references.

A reference is the same on every rank, and each stores the part that its own shards are. In bf16 these are
DTensors like the parameters, which load on any mesh, bit for bit. Residuals, and references in int8, belong
to a rank: all are stored as one tensor (ranks, bytes), sharded over the mesh. On as many ranks a run goes on
bit for bit. On another number of ranks residuals begin from zero and int8 references from the masters, which
is said: the gradients of one step lose what rounding took from them.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtrain.comm.all_gather import DeltaGather, WeightGather
from dtrain.comm.feedback import Residual
from dtrain.comm.fsdp import Unit

log = logging.getLogger(__name__)

__all__ = ["CommState"]

_RESIDUAL, _OF, _REFERENCE = "residual.", "residual_of.", "reference."


class CommState:
    """Residuals and references of a model.

    Args:
        mesh: of the model.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._residuals: dict[str, Residual] = {}
        self._gathers: list[tuple[Unit, DeltaGather]] = []

    def add(self, unit: Unit, gather: WeightGather | None, residuals: list[Residual]) -> None:
        """Include what a unit's collectives remember."""
        if isinstance(gather, DeltaGather):
            self._gathers.append((unit, gather))
        self._residuals |= {residual.name: residual for residual in residuals}

    @property
    def nbytes(self) -> int:
        """Memory that it takes on this rank."""
        residuals = sum(residual.nbytes for residual in self._residuals.values())
        return residuals + sum(gather.reference.nbytes for _, gather in self._gathers)

    def forget_errors(self) -> None:
        """Residuals begin anew: what a gradient left that was not finite would spoil all to come."""
        for residual in self._residuals.values():
            residual.clear()

    def tensors(self) -> dict[str, Tensor]:
        """All that there is by now, for `torch.distributed.checkpoint`; empty before the first step."""
        found: dict[str, Tensor] = {}
        for name, residual in self._residuals.items():
            if residual.state is not None:
                of, tensor = residual.state
                found[_RESIDUAL + name] = self._of_ranks(tensor)
                found[_OF + name] = torch.tensor(of)
        for unit, gather in self._gathers:
            reference = gather.reference
            if not (reference.ready or reference.saved is not None):
                continue
            packed = reference.packed(unit.shard_group.rank())
            if reference.by_number:
                found |= _by_parameter(unit, packed)
            else:
                found[_REFERENCE + unit.name] = self._of_ranks(packed[0])
        return found

    def room(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors to load a checkpoint into: of what it holds that which this mesh can take.

        Args:
            saved: metadata of its tensors by the names that `tensors` gave.
        """
        room: dict[str, Tensor] = {}
        by_rank = [_RESIDUAL + name for name in self._residuals]
        by_rank += [
            _REFERENCE + unit.name for unit, gather in self._gathers if not gather.reference.by_number
        ]
        there = {name: saved[name].size for name in by_rank if name in saved}
        for unit, gather in self._gathers:
            name, size = _REFERENCE + unit.name, gather.reference.packed_bytes
            if name in there and there[name][1] != size:
                log.warning("comm: %s was cut otherwise: its reference begins anew.", unit.name)
                del there[name]
        for name, (ranks, size) in there.items():
            if ranks == self.mesh.size():
                mine = torch.zeros(size, dtype=torch.uint8, device=self.mesh.device_type)
                room[name] = self._of_ranks(mine)
        if left := there.keys() - room.keys():
            log.warning(
                "comm: on %d ranks these begin anew, the checkpoint has them of another number: %s",
                self.mesh.size(), ", ".join(sorted(left)),
            )  # fmt: skip
        for name in self._residuals:
            if _RESIDUAL + name in room:
                room[_OF + name] = torch.zeros(saved[_OF + name].size, dtype=torch.int64)
        for unit, gather in self._gathers:
            for name, _, shard in unit.shards() if gather.reference.by_number else ():
                if _REFERENCE + name in saved:
                    room[_REFERENCE + name] = torch.empty_like(shard, dtype=torch.bfloat16)
        return room

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was loaded into `room`; what is not there begins anew."""
        for name, residual in self._residuals.items():
            residual.clear()
            if _RESIDUAL + name in tensors:
                of = tuple(tensors[_OF + name].tolist())
                residual.restore(of, _local(tensors[_RESIDUAL + name])[0])
        for unit, gather in self._gathers:
            reference = gather.reference
            reference.clear()
            if _REFERENCE + unit.name in tensors:
                reference.saved = _local(tensors[_REFERENCE + unit.name])
            elif all(_REFERENCE + name in tensors for name in unit.parameters):
                reference.saved = reference.pack(_row(unit, tensors))

    def _of_ranks(self, mine: Tensor) -> Tensor:
        """(ranks, size), of which this rank has its row (size,)."""
        return DTensor.from_local(
            mine[None],
            self.mesh,
            [Shard(0)] * self.mesh.ndim,
            run_check=False,
            shape=torch.Size((self.mesh.size(), len(mine))),
            stride=(len(mine), 1),
        )


def _by_parameter(unit: Unit, packed: Tensor) -> dict[str, Tensor]:
    """This rank's row (1, bytes) of a reference in bf16, as DTensors like the parameters."""
    row = packed.view(torch.bfloat16)[0]
    found: dict[str, Tensor] = {}
    for name, start, shard in unit.shards():
        local = _local(shard)
        found[_REFERENCE + name] = DTensor.from_local(
            row[start : start + local.numel()].view(local.shape),
            shard.device_mesh,
            shard.placements,
            run_check=False,
            shape=shard.shape,
            stride=shard.stride(),
        )
    return found


def _row(unit: Unit, tensors: Mapping[str, Tensor]) -> Tensor:
    """This rank's row (1, n) of a reference, from its shards."""
    row = torch.zeros(1, sum(unit.numels), device=unit.device)
    for name, start, _ in unit.shards():
        local = _local(tensors[_REFERENCE + name])
        row[0, start : start + local.numel()].copy_(local.view(-1))
    return row


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
