"""What a simulated step says of memory: the peak, when it is reached, and what for."""

from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.plan.accounts import (
    AVERAGES,
    BACKWARD,
    BATCH,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    WIRE,
    is_activation,
)  # fmt: skip
from dtrain.plan.simulate import Simulation

__all__ = ["KINDS", "Peak", "find_peak", "kind_of"]

ACTIVATIONS = "activations"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGES, ACTIVATIONS, BACKWARD, GATHERED, WIRE, BATCH, OTHER)


@dataclass(frozen=True)
class Peak:
    """The moment at which rank 0 holds the most.

    Attributes:
        nbytes: in all.
        accounts: bytes of each, by name.
        when: what runs.
        event: its number in the simulation.
    """

    nbytes: int
    accounts: dict[str, int]
    when: str
    event: int

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


def find_peak(simulation: Simulation) -> Peak:
    """The peak of a step."""
    best, at = max((live, i) for i, live in enumerate(_live(simulation)))
    totals = list(simulation.start)
    for delta, account in simulation.events[:at]:
        totals[account] += delta
    accounts = {name: n for name, n in zip(simulation.accounts, totals, strict=True) if n}
    when = [mark.name for mark in simulation.marks if mark.event < at]
    return Peak(best, accounts, when[-1] if when else "start of the step", at)


def _live(simulation: Simulation) -> Iterator[int]:
    """Bytes before the first event, and after each."""
    live = sum(simulation.start)
    yield live
    for delta, _ in simulation.events:
        live += delta
        yield live
