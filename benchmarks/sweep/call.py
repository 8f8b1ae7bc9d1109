"""A function without gradients as a case: what it returns counts, and inputs may be overwritten."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.case import Case, Cost, Gate
from benchmarks.sweep.contest import Function, Rivals, contest
from benchmarks.sweep.errors import TWICE_THE_BASELINE, worst_error
from benchmarks.sweep.plan import LeftOut, Plan, Settings

__all__ = ["Call", "CallInputs", "Routine", "call_plans"]


@dataclass(frozen=True)
class Routine:
    """A function at one size.

    Args:
        name: of its case.
        title: what it does and how large, for people.
        rivals: functions of `draw`'s tensors to those that count.
        draw: the inputs.
        spent: which of them are overwritten.
        cost: of a call.
        gates: what must hold.
    """

    name: str
    title: str
    rivals: Rivals
    draw: Callable[[], Sequence[Tensor]]
    cost: Cost
    spent: tuple[int, ...] = ()
    gates: tuple[Gate, ...] = (TWICE_THE_BASELINE,)


class CallInputs:
    """Of one size, and the truth about them."""

    def __init__(self, definition: Function, inputs: Sequence[Tensor]) -> None:
        self.definition, self.inputs = definition, inputs

    @cached_property
    def exact(self) -> list[Tensor]:
        """What the definition makes in fp64."""
        wide = [x.double() if x.is_floating_point() else x for x in self.inputs]
        return Call(CallInputs(self.definition, wide), self.definition).results()


class Call:
    """One call; over and over, it works on what it has left behind of the inputs that it overwrites."""

    def __init__(self, inputs: CallInputs, function: Function, spent: tuple[int, ...] = ()) -> None:
        self.inputs, self.function, self.spent = inputs, function, spent
        self.given = [x.clone() if i in spent else x for i, x in enumerate(inputs.inputs)]

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        out = self.function(*self.given)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def results(self) -> list[Tensor]:
        """Of the inputs as they were at first."""
        for i in self.spent:
            self.given[i].copy_(self.inputs.inputs[i])
        return [x.clone() for x in self()]

    def error(self) -> float:
        """The worst of what it makes, relative to fp64; NaN where one of them is."""
        return worst_error(zip(self.results(), self.inputs.exact, strict=True))


def call_plans(settings: Settings, routine: Routine) -> Iterator[Plan]:
    """The one case."""
    yield Plan(routine.name, routine.cost.flops, partial(_make, settings, routine))


def _make(settings: Settings, routine: Routine) -> tuple[Case, list[LeftOut]]:
    rivals = routine.rivals
    inputs = CallInputs(rivals.definition, routine.draw())
    works = {
        label: partial(Call, inputs, function, routine.spent)
        for label, function in rivals.entrants(settings).items()
    }
    return contest(
        routine.name, routine.title, settings, works, rivals.missing(settings), routine.cost, routine.gates
    )
