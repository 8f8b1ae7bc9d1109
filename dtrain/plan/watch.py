"""What no operator tells the ledger: all seams of the planner to the insides of others, in one file.

FSDP2 gives gathered parameters their memory, and takes it back, by resizing storages; and what it allocates
around collectives are buffers, whoever's turn it is. Stashed inputs wait in the host's memory. A budget
measures blocks on tensors without data, which take none. Written against torch 2.11 to 2.13.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from dtrain.activations.budget import Budget
from dtrain.activations.host import HostStore
from dtrain.plan.accounts import GATHERED, HOST, WIRE
from dtrain.plan.ledger import Ledger

__all__ = ["watched"]

_Inner = Callable[..., Any]


@contextmanager
def watched(ledger: Ledger) -> Iterator[None]:
    """Tell the ledger of all that, meanwhile."""
    exchanged: list[tuple[Any, str, Callable[[Ledger, _Inner], _Inner]]] = [
        (module, name, _resizing)
        for module in (_fsdp_param, _fsdp_param_group)
        for name in ("alloc_storage", "free_storage")
        # The first defines both, and a version without them must not pass; the second may have imported one.
        if module is _fsdp_param or hasattr(module, name)
    ]
    exchanged += [
        (FSDPParamGroup, name, _buffers)
        for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
    ]
    exchanged += [
        (FSDPParamGroup, "pre_backward", _marking),
        (HostStore, "_buffer", _on_host),
        (Budget, "measure", _unseen),
    ]
    with ExitStack() as stack:
        for owner, name, wrap in exchanged:
            inner = getattr(owner, name)
            stack.callback(setattr, owner, name, inner)
            setattr(owner, name, wrap(ledger, inner))
        yield


def _resizing(ledger: Ledger, inner: _Inner) -> _Inner:
    def call(tensor: Tensor) -> None:
        inner(tensor)
        ledger.assign(tensor, GATHERED)
        ledger.resized(tensor)

    return call


def _buffers(ledger: Ledger, inner: _Inner) -> _Inner:
    def call(*args: Any, **kwargs: Any) -> Any:
        with ledger.scope(WIRE):
            return inner(*args, **kwargs)

    return call


def _marking(ledger: Ledger, inner: _Inner) -> _Inner:
    def call(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
        ledger.mark(f"backward of {group._module_fqn or 'the rest'}")
        return inner(group, *args, **kwargs)

    return call


def _on_host(ledger: Ledger, inner: _Inner) -> _Inner:
    def call(*args: Any) -> Any:
        buffer = inner(*args)
        ledger.assign(buffer, HOST)
        return buffer

    return call


def _unseen(ledger: Ledger, inner: _Inner) -> _Inner:
    def call(*args: Any) -> Any:
        with ledger.paused():
            return inner(*args)

    return call
