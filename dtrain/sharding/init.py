"""Filling parameters after `to_empty`, the same on every world size.

Each parameter is drawn whole from a generator keyed by (seed, parameter name) and every rank keeps its shard:
no communication, one full parameter in memory at a time, and initial weights that do not depend on the mesh.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dtrain.rng import derive_seed

# Fills the full fp32 CPU tensor of the parameter called `name` in place, drawing from the generator.
Initializer = Callable[[str, Tensor, torch.Generator], None]


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter or buffer, which may be a shard (then only the shard is kept)."""
    if isinstance(target, DTensor):
        local = full.to(target.device, target.dtype)
        target.copy_(distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(full)


def fill_parameters(model: nn.Module, initializer: Initializer, seed: int | None = None) -> None:
    """Fill all parameters with `initializer`.

    Args:
        model: materialised, sharded or not.
        initializer: see `Initializer`.
        seed: the base seed; PyTorch's current global seed when absent.
    """
    seed = torch.initial_seed() % 2**63 if seed is None else seed
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape)
        initializer(name, full, torch.Generator().manual_seed(derive_seed(seed, "init", name)))
        copy_full(parameter.data, full)


def fill_by_building(build: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    """An `init` for models that initialise themselves in their constructor.

    Builds an unsharded copy on the CPU of every rank under the current global seed, and copies its parameters
    and buffers. Right for models that fit in host memory once per rank.
    """

    def init(model: nn.Module) -> None:
        source = build()
        targets = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, full in [*source.named_parameters(), *source.named_buffers()]:
            copy_full(targets[name].data, full.data)

    return init
