"""Where a step costs nothing: one rank of many, that talks to none, on tensors without data."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dtrain.kernels.launch import planned_for
from dtrain.recipe import Batch

__all__ = ["alone", "faked", "without_data"]


@contextmanager
def alone(world: int) -> Iterator[None]:
    """A process group of `world` ranks, of which this is the first and the only one.

    Raises:
        ValueError: a process group is up already.
    """
    # Registers the backend; there is no public door to it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a process group is up already: plan in a process of its own")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def without_data(mode: FakeTensorMode, arch: str = "") -> Iterator[None]:
    """Tensors made meanwhile have no data; kernels are those of a GPU `arch`, or of the CPU for ""."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
        stack.enter_context(mode)
        if arch:
            stack.enter_context(planned_for(arch))
        yield


def faked(batches: Sequence[Batch], mode: FakeTensorMode) -> list[Batch]:
    """Tensors without data; but indices, which random streams are keyed by, as numbers."""
    return [
        {
            key: mode.from_tensor(value) if isinstance(value, Tensor) and key != "index" else value
            for key, value in batch.items()
        }
        | {"index": [int(i) for i in batch["index"]]}
        for batch in batches
    ]
