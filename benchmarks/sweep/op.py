"""A differentiable operation as two cases, its forward and its backward pass.

A forward pass is timed as in training: what its backward needs is kept until the call returns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from benchmarks.case import Case, Cost
from benchmarks.sweep.contest import Function, Rivals, contest
from benchmarks.sweep.errors import worst_error
from benchmarks.sweep.plan import LeftOut, Plan, Settings

__all__ = ["Inputs", "Op", "Pass", "Step", "op_plans"]

Pass: TypeAlias = Literal["forward", "backward"]
_PASSES: tuple[Pass, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Op:
    """An operation at one size.

    Args:
        name: of its cases, around the pass: "norm" and "rms_d2048" give norm_forward_rms_d2048.
        title: what it is and how large, for people.
        rivals: functions of `draw`'s tensors; the definition is differentiable in any precision.
        draw: tensors that ask for gradients, then the gradients of the outputs; in the settings' dtype.
        cost: of each pass.
    """

    name: tuple[str, str]
    title: str
    rivals: Rivals
    draw: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    cost: Mapping[Pass, Cost]


class Inputs:
    """Of one size, and the truth about them."""

    def __init__(self, definition: Function, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.definition, self.leaves, self.grads = definition, leaves, grads

    @cached_property
    def exact(self) -> list[Tensor]:
        """Outputs, then gradients, in fp64."""
        return Step(self, self.definition, "backward", torch.float64).results()


class Step:
    """One pass, or the other; the forward pass before a backward one is made once, here."""

    def __init__(
        self, inputs: Inputs, function: Function, way: Pass, dtype: torch.dtype | None = None
    ) -> None:
        self.inputs, self.function, self.way = inputs, function, way
        self.leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs.leaves]
        self.grads = [g.to(dtype or g.dtype) for g in inputs.grads]
        self.outputs = self._forward() if way == "backward" else ()

    def __call__(self) -> tuple[Tensor, ...]:
        if self.way == "forward":
            return self._forward()
        return torch.autograd.grad(self.outputs, self.leaves, self.grads, retain_graph=True)

    def results(self) -> list[Tensor]:
        return [x.detach() for x in (*self.outputs, *self())]

    def error(self) -> float:
        """The worst of what this pass makes, relative to fp64; NaN where one of them is."""
        # A forward pass makes the first of them.
        return worst_error(zip(self.results(), self.inputs.exact, strict=False))

    def _forward(self) -> tuple[Tensor, ...]:
        with torch._functorch.config.patch(donated_buffer=False):  # its backward is called many times
            out = self.function(*self.leaves)
        return (out,) if isinstance(out, Tensor) else tuple(out)


def op_plans(settings: Settings, op: Op) -> Iterator[Plan]:
    """Its forward pass, then its backward pass."""
    for way in _PASSES:
        name = f"{op.name[0]}_{way}_{op.name[1]}"
        yield Plan(name, op.cost[way].flops, partial(_make, name, settings, op, way))


def _make(name: str, settings: Settings, op: Op, way: Pass) -> tuple[Case, list[LeftOut]]:
    rivals = op.rivals
    inputs = Inputs(rivals.definition, *op.draw())
    works = {
        label: partial(Step, inputs, function, way) for label, function in rivals.entrants(settings).items()
    }
    return contest(name, f"{op.title}, {way}", settings, works, rivals.missing(settings), op.cost[way])
