"""Live tensor bytes, by who owns them, while a program runs: on real tensors, or on fake ones.

Every storage that an operator returns counts from then until it is freed, once, however many tensors view it.
Operators of this package are looked into. What others allocate inside and free before they return is unseen,
except for what `dtrain.plan.workspace` knows of a GPU's.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from dtrain.kernels.launch import arch_of
from dtrain.kernels.op import kernel_of
from dtrain.plan.accounts import OTHER, WORKSPACE
from dtrain.plan.wire import Sent, sent_by
from dtrain.plan.work import Work, work_of
from dtrain.plan.workspace import cublas_bytes, workspace_bytes

__all__ = ["Event", "Ledger", "Mark", "storages_of"]


class Event(NamedTuple):
    """A storage begins, ends or changes its size: `delta` bytes more of what `account` holds."""

    delta: int
    account: int


class Mark(NamedTuple):
    """Something begins at the event of that number."""

    event: int
    name: str


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storage of a tensor, or those inside a wrapper such as DTensor."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor.untyped_storage()
        return
    for name in wrapper.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(wrapper, name), Tensor):  # DTensor names its mesh too
            yield from storages_of(inner)


class _Held:
    """One storage that lives."""

    __slots__ = ("account", "first", "nbytes", "ref")

    def __init__(
        self, ref: "weakref.ref[torch.UntypedStorage]", nbytes: int, account: int, first: int
    ) -> None:
        self.ref = ref
        self.nbytes = nbytes
        self.account = account
        self.first = first  # event


class Ledger(TorchDispatchMode):
    """Notes who holds how many bytes, and when.

    Args:
        device_type: "cpu" or "cuda": whose kernels run; "cuda" inside of `kernels.launch.planned_for`.

    Attributes:
        accounts: names of what `Event.account` numbers.
        events: in order.
        marks: what the caller said on the way.
        sent: collectives.
        work: of each operator that computes or copies.
        live: bytes now.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.device_type = device_type
        self._depth = 0
        self._paused = False
        self.accounts: list[str] = []
        self.events: list[Event] = []
        self.marks: list[Mark] = []
        self.sent: list[Sent] = []
        self.work: list[Work] = []
        self.live = 0
        self._numbers: dict[str, int] = {}
        self._held: dict[int, _Held] = {}
        self._scope = self._number(OTHER)
        # Tensors of a CPU stand for those of the GPU that is planned for.
        self._arch = arch_of(torch.device("cpu")) if device_type == "cuda" else ""
        if self._arch:
            self._note(cublas_bytes(self._arch), self._number(WORKSPACE))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        if sent := sent_by(func, args):
            self.sent.append(sent)
        # What writes to its arguments only allocates nothing.
        kernel = None if func._schema.is_mutable else kernel_of(func, self.device_type)
        if kernel is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self._inside():
                out = kernel(*args)
        if not self._depth and (work := work_of(func, args, kwargs or {}, out)):
            self.work.append(work)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self._arch and (inside := workspace_bytes(func, args, kwargs or {}, self._arch)):
            self._note(inside, self._number(WORKSPACE))
            self._note(-inside, self._number(WORKSPACE))
        return out

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Look into an operator, whose work counts as a whole."""
        self._depth += 1
        try:
            with self:
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs meanwhile takes no memory."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def scope(self, account: str) -> Iterator[None]:
        """What is allocated meanwhile is of this account."""
        before, self._scope = self._scope, self._number(account)
        try:
            yield
        finally:
            self._scope = before

    def enter(self, account: str) -> int:
        """Like `scope`, for hooks: returns what `leave` takes."""
        before, self._scope = self._scope, self._number(account)
        return before

    def leave(self, before: int) -> None:
        """The end of what `enter` began."""
        self._scope = before

    def mark(self, name: str) -> None:
        """Say what begins now."""
        self.marks.append(Mark(len(self.events), name))

    def assign(self, tensor: Tensor, account: str) -> None:
        """Put a tensor, known or not, into an account, from now on."""
        number = self._number(account)
        for storage in storages_of(tensor):
            held = self._held.get(storage._cdata)
            if held is None:
                self._begin(storage, number)
            elif held.account != number:
                self._note(-held.nbytes, held.account)
                self._note(held.nbytes, number)
                held.account = number

    def claim(self, tensor: Tensor, account: str) -> None:
        """Put a known tensor of constant size into an account, as if it had been there from its beginning."""
        number = self._number(account)
        for storage in storages_of(tensor):
            held = self._held[storage._cdata]
            if held.account != number:
                self.events[held.first] = Event(self.events[held.first].delta, number)
                held.account = number

    def resized(self, tensor: Tensor) -> None:
        """Look at the size of a tensor's storage again: no operator tells of `storage.resize_`."""
        for storage in storages_of(tensor):
            held = self._held[storage._cdata]
            self._note(storage.nbytes() - held.nbytes, held.account)
            held.nbytes = storage.nbytes()

    def _see(self, tensor: Tensor) -> None:
        for storage in storages_of(tensor):
            if storage._cdata not in self._held:
                self._begin(storage, self._scope)

    def _begin(self, storage: torch.UntypedStorage, account: int) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        ref = weakref.ref(storage, lambda _: self._end(key))
        self._held[key] = _Held(ref, nbytes, account, len(self.events))
        self._note(nbytes, account)

    def _end(self, key: int) -> None:
        held = self._held.pop(key)
        self._note(-held.nbytes, held.account)

    def _note(self, delta: int, account: int) -> None:
        if delta:
            self.live += delta
            self.events.append(Event(delta, account))

    def _number(self, account: str) -> int:
        if account not in self._numbers:
            self._numbers[account] = len(self.accounts)
            self.accounts.append(account)
        return self._numbers[account]
