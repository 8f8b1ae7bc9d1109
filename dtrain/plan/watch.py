"""The seam to FSDP2 for the planner: what it allocates and frees without an operator telling of it.

FSDP2 gives gathered parameters their memory, and takes it back, by resizing storages; and what it allocates
around collectives are buffers, whoever's turn it is. Written against torch 2.11 to 2.13.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from dtrain.plan.accounts import GATHERED, WIRE
from dtrain.plan.ledger import Ledger

__all__ = ["watched"]

_RESIZERS = ("alloc_storage", "free_storage")
_COLLECTIVES = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")


@contextmanager
def watched(ledger: Ledger) -> Iterator[None]:
    """Tell the ledger of gathered parameters and of buffers around collectives, meanwhile."""
    with ExitStack() as stack:
        for module in (_fsdp_param, _fsdp_param_group):
            for name in _RESIZERS:
                if inner := getattr(module, name, None):
                    stack.enter_context(mock.patch.object(module, name, _resizing(ledger, inner)))
        for name in _COLLECTIVES:
            inner = getattr(FSDPParamGroup, name)
            stack.enter_context(mock.patch.object(FSDPParamGroup, name, _scoped(ledger, inner)))
        before = FSDPParamGroup.pre_backward
        stack.enter_context(mock.patch.object(FSDPParamGroup, "pre_backward", _marking(ledger, before)))
        yield


def _resizing(ledger: Ledger, inner: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def resize(tensor: Tensor) -> None:
        inner(tensor)
        ledger.assign(tensor, GATHERED)
        ledger.resized(tensor)

    return resize


def _marking(ledger: Ledger, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
        ledger.mark(f"backward of {group._module_fqn or 'the rest'}")
        return inner(group, *args, **kwargs)

    return call


def _scoped(ledger: Ledger, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with ledger.scope(WIRE):
            return inner(*args, **kwargs)

    return call
