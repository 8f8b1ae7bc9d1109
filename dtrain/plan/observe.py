"""A training step of any model, watched: who holds how many bytes and when, what is computed and sent."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.plan.accounts import BACKWARD, GRADIENTS, activations
from dtrain.plan.ledger import Event, Ledger, Mark
from dtrain.plan.watch import watched
from dtrain.plan.wire import Sent
from dtrain.plan.work import Work

__all__ = ["Observed", "Subject", "observe"]


@dataclass(frozen=True)
class Subject:
    """A model that is ready to train.

    Attributes:
        model: whose forward and backward are told apart; as it is called, wrapped or not.
        blocks: its repeated blocks by name: each has an account of its own.
        gradients: takes the forwards and backwards of one step.
        optimizer: of the model; its state must be there.
        state: tensors that are there before the step, by account.
        gradients_account: of what is left in `grad`.
        settles: whether a first step differs from those after it, by what it leaves behind.
    """

    model: nn.Module
    blocks: Mapping[str, nn.Module]
    gradients: Callable[[], object]
    optimizer: torch.optim.Optimizer
    state: Mapping[str, Iterable[Tensor]]
    gradients_account: str = GRADIENTS
    settles: bool = True


@dataclass(frozen=True)
class Observed:
    """One step of one rank.

    Attributes:
        accounts: names by number.
        start: bytes of each account when the step begins.
        events: of the step.
        marks: what begins at which event.
        sent: collectives.
        work: of each operator.
    """

    accounts: tuple[str, ...]
    start: tuple[int, ...]
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]
    sent: tuple[Sent, ...]
    work: tuple[Work, ...]


def observe(subject: Subject, ledger: Ledger) -> Observed:
    """Take one step to warm up, whose buffers may stay, and note another one, up to the update."""
    for account, tensors in subject.state.items():
        for tensor in tensors:
            ledger.assign(tensor, account)
    with watched(ledger), _scopes(subject, ledger), ledger:
        if subject.settles:
            subject.gradients()
            subject.optimizer.zero_grad(set_to_none=True)
            subject.optimizer.step()  # of nothing, but weights count as changed
        before = len(ledger.events)
        start = _totals(ledger)
        for noted in (ledger.marks, ledger.sent, ledger.work):
            noted.clear()
        subject.gradients()
    for parameter in subject.model.parameters():
        if parameter.grad is not None:
            ledger.claim(parameter.grad, subject.gradients_account)
    ledger.mark("update")
    return Observed(
        accounts=tuple(ledger.accounts),
        start=(*start, *[0] * (len(ledger.accounts) - len(start))),
        events=tuple(ledger.events[before:]),
        marks=tuple(Mark(mark.event - before, mark.name) for mark in ledger.marks),
        sent=tuple(ledger.sent),
        work=tuple(ledger.work),
    )


def _totals(ledger: Ledger) -> list[int]:
    totals = [0] * len(ledger.accounts)
    for delta, account in ledger.events:
        totals[account] += delta
    return totals


@contextmanager
def _scopes(subject: Subject, ledger: Ledger) -> Iterator[None]:
    """Accounts of what forward and backward allocate."""
    entered: list[int] = []

    def enter(account: str) -> Any:
        def hook(*_: Any) -> None:
            entered.append(ledger.enter(account))

        return hook

    def leave(*_: Any) -> None:
        ledger.leave(entered.pop())

    def begin(*_: Any) -> None:
        ledger.mark("forward")
        entered.append(ledger.enter(activations("")))

    def turn(*_: Any) -> None:
        entered.pop()
        ledger.mark("backward")
        ledger.enter(BACKWARD)

    handles = [
        subject.model.register_forward_pre_hook(begin, prepend=True),
        subject.model.register_forward_hook(turn),
    ]
    for name, block in subject.blocks.items():
        handles += [
            block.register_forward_pre_hook(enter(activations(name)), prepend=True),
            block.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
