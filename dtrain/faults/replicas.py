"""Ranks that ought to be alike: their config and code at the start, their replicas of the weights on the way.

A replica goes its own way after a bit flip, or a collective that went wrong, and nothing else would show it.
Each rank sums the bits of its shards, every element times a number of its own, modulo 2⁶⁴: any change of a
bit changes the sum. Sums of ranks that hold the same shard are held against each other.
"""

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtrain.faults.errors import RunFault
from dtrain.sharding.local import local_part

__all__ = ["ReplicaDiverged", "check_alike", "check_replicas", "code_digest"]

_PIECE = 2**22  # elements at a time
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd: no element's bits are lost
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaDiverged(RunFault):
    """Weights that ought to be equal are not."""


def check_alike(what: str, mine: str) -> None:
    """Raise ValueError, naming ranks, unless all ranks say the same."""
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    different = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if different:
        raise ValueError(f"Ranks {_listed(different)} have other {what} than rank 0.")


def code_digest(*modules: str) -> str:
    """Of all Python files in the folders of some imported modules, and below."""
    digest = hashlib.sha256()
    for name in modules:
        root = Path(sys.modules[name].__file__ or "").parent
        for place, folders, files in os.walk(root, followlinks=True):  # kernels are linked
            folders.sort()
            for file in sorted(file for file in files if file.endswith(".py")):
                digest.update(f"{Path(place).relative_to(root) / file}\n".encode())
                digest.update(Path(place, file).read_bytes())
    return digest.hexdigest()


def check_replicas(model: nn.Module, mesh: DeviceMesh, step: int) -> None:
    """Compare the weights of all replicas. All ranks call it.

    Args:
        model: whose parameters lie on the mesh.
        mesh: with the dim "replicate".
        step: that was made last, for the message.

    Raises:
        ReplicaDiverged: naming the ranks that differ from most others, and the first parameter.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    mine = torch.stack([_bits(local_part(p.detach())) for p in parameters]).cpu()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (_shard_of(mesh), mine.tolist()))
    found = _different(everyone)
    if found:
        rank, index = min(found.items())
        raise ReplicaDiverged(
            f"after step {step} rank(s) {_listed(sorted(found))} hold other weights than their replicas, "
            f"rank {rank} from {names[index]} on: resume from a checkpoint before it, and look at its device."
        )


def _different(everyone: Sequence[tuple[int, list[int]]]) -> dict[int, int]:
    """Ranks that differ from most that hold the same shard, and the first parameter in which they do."""
    groups: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for rank, (shard, sums) in enumerate(everyone):
        groups[shard][rank] = sums
    found: dict[int, int] = {}
    for group in groups.values():
        for index, column in enumerate(zip(*group.values(), strict=True)):
            counts = Counter(column)
            usual, most = counts.most_common(1)[0]
            # Of two that differ nobody knows who is right.
            wrong = {value for value in counts if value != usual or 2 * most <= len(column)}
            for rank, value in zip(group, column, strict=True):
                if len(counts) > 1 and value in wrong:
                    found.setdefault(rank, index)
    return found


def _shard_of(mesh: DeviceMesh) -> int:
    return mesh.get_local_rank("shard")


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=flat.device)
        total += (piece * (2 * places + 1) * _FACTOR).sum()
    return total


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
