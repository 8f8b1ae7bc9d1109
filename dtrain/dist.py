"""Process groups: one context manager that works under torchrun and without it."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Ranks on this host."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment_world_size() -> int:
    """World size that torchrun announced, 1 without it; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment_rank() -> int:
    """Rank that torchrun announced, 0 without it; needs no process group."""
    return int(os.environ.get("RANK", "0"))


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(timeout_s: float = 600.0) -> Iterator[World]:
    """Start the default process group, yield this rank's `World`, and take the group down again.

    CUDA devices get NCCL for tensors and gloo for host objects; the CPU gets gloo. Without torchrun's
    environment variables the world is this one process.

    Args:
        timeout_s: how long a collective may wait for its peers before it fails.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder, see dtrain.faults.watchdog
    device = _local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    device_id = device if device.type == "cuda" else None
    store, rank, size = _meet(timeout)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id
    )
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield World(dist.get_rank(), dist.get_world_size(), device, local_size)
    except BaseException:
        dist.destroy_process_group()
        raise
    leave_process_group()


def _meet(timeout: timedelta) -> tuple[Store, int, int]:
    """The store in which ranks find each other, this one's rank, and their number."""
    if "RANK" not in os.environ:
        return HashStore(), 0, 1
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over restarts: without a name of its own a rank would read the address of one
    # that is dead, and wait for it.
    return PrefixStore(f"attempt-{attempt()}", store), rank, size


def attempt() -> int:
    """How often torchrun has started these ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def leave_process_group() -> None:
    """Take the default process group down, all ranks together, with every group that a mesh made.

    A group that outlives this, because a model in a reference cycle holds its mesh, keeps threads: one that
    releases a tensor while the interpreter ends is stopped inside a destructor, and the process aborts.
    """
    try:
        dist.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()
