"""What a simulated step says of memory: the peak, when it is reached, and what for."""

from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.plan.accounts import (
    AVERAGES,
    BACKWARD,
    BATCH,
    GATHERED,
    GRADIENTS,
    HOST,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    WIRE,
    WORKSPACE,
    is_activation,
)  # fmt: skip
from dtrain.plan.observe import Observed

__all__ = ["KINDS", "Peak", "find_peak", "kind_of"]

ACTIVATIONS = "activations"
KINDS = (
    PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGES,
    ACTIVATIONS, BACKWARD, GATHERED, WIRE, BATCH, WORKSPACE, OTHER,
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """The moment at which rank 0 holds the most.

    Attributes:
        nbytes: in all.
        accounts: bytes of each, by name.
        when: what runs.
        event: its number in the simulation.
        host_bytes: at the most in the host's memory, beside it.
    """

    nbytes: int
    accounts: dict[str, int]
    when: str
    event: int
    host_bytes: int

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind, activations of all blocks together."""
        totals = dict.fromkeys(KINDS, 0)
        for account, nbytes in self.accounts.items():
            totals[kind_of(account)] += nbytes
        return totals


def kind_of(account: str) -> str:
    """Activations of a block are of the kind of all activations."""
    return ACTIVATIONS if is_activation(account) else account


def find_peak(simulation: Observed) -> Peak:
    """The peak of a step."""
    on_host = simulation.accounts.index(HOST) if HOST in simulation.accounts else None
    live = list(_live(simulation, on_host, alone=False))
    best = max(live)
    at = live.index(best)
    totals = list(simulation.start)
    for delta, account in simulation.events[:at]:
        totals[account] += delta
    accounts = {name: n for name, n in zip(simulation.accounts, totals, strict=True) if n and name != HOST}
    when = [mark.name for mark in simulation.marks if mark.event < at]
    host = max(_live(simulation, on_host, alone=True))
    return Peak(best, accounts, when[-1] if when else "start of the step", at, host)


def _live(simulation: Observed, account: int | None, alone: bool) -> Iterator[int]:
    """Bytes before the first event, and after each: of one account alone, or of all but that."""
    live = sum(n for i, n in enumerate(simulation.start) if (i == account) == alone)
    yield live
    for delta, i in simulation.events:
        if (i == account) == alone:
            live += delta
        yield live
