"""What the least work takes here: a copy, a synced file and its hash, each by one plain call a rank."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.saving.records import Limits
from benchmarks.saving.training import copied
from dtrain.checkpoint import TrainingState

__all__ = ["take_limits"]


def take_limits(limits: Limits, state: TrainingState, room: Mapping[str, Tensor], path: Path) -> None:
    """Take one sample each, all ranks at once.

    Args:
        limits: to add to.
        state: of the training.
        room: memory for this rank's part of it, used before.
        path: of a file to write and remove.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    begun = time.perf_counter()
    copied(state, room)
    limits.copy_s += (time.perf_counter() - begun,)
    dist.barrier()
    begun = time.perf_counter()
    _write(room, path)
    limits.write_s += (time.perf_counter() - begun,)
    dist.barrier()
    begun = time.perf_counter()
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    limits.hash_s += (time.perf_counter() - begun,)
    path.unlink()
    dist.barrier()


def _write(room: Mapping[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        for tensor in room.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
