"""The device mesh: how ranks divide into replicas and shards.

Parameters, gradients and optimizer state are split over the `shard` axis and copied over the `replicate`
axis (hybrid sharded data parallel, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the world size."""

    replicate: int = field(
        default=1, metadata={"help": "Copies of the sharded model: usually nodes / nodes per copy."}
    )
    shard: int = field(
        default=-1,
        metadata={"help": "Ranks that share one copy of parameters and optimizer; -1 takes all that remain."},
    )

    def __post_init__(self) -> None:
        if self.replicate < 1:
            raise ValueError(f"mesh.replicate = {self.replicate}: must be 1 or more.")
        if self.shard != -1 and self.shard < 1:
            raise ValueError(f"mesh.shard = {self.shard}: must be 1 or more, or -1 for all remaining ranks.")

    def sizes(self, world: int) -> tuple[int, int]:
        """Resolve (replicate, shard) for a world size; ValueError when they do not fit."""
        if self.shard == -1:
            if world % self.replicate:
                raise ValueError(
                    f"mesh.replicate = {self.replicate} does not divide the world size {world}: "
                    f"use one of {_divisors(world)}, or start another number of ranks."
                )
            return self.replicate, world // self.replicate
        if self.replicate * self.shard != world:
            raise ValueError(
                f"mesh.replicate x mesh.shard = {self.replicate} x {self.shard} = "
                f"{self.replicate * self.shard}, but the world size is {world}: "
                f"change one of them, or set mesh.shard = -1."
            )
        return self.replicate, self.shard


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def build_mesh(config: MeshConfig, world: int, device_type: str) -> DeviceMesh:
    """Build the ("replicate", "shard") mesh, or the one-axis ("shard",) mesh when there is one replica."""
    replicate, shard = config.sizes(world)
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def mean_over(mesh: DeviceMesh, value: Tensor) -> Tensor:
    """Average a tensor over all ranks of the mesh; same shape, a new tensor."""
    total = value.clone()
    for axis in range(mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(axis))
    return total / mesh.size()
