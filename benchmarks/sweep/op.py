"""A differentiable operation as two cases, its forward and its backward pass: ours, its definition, others'.

The baseline is the definition, run eagerly; it is also compiled, and in fp64 it is the truth. A forward pass
is timed as in training: what its backward needs is kept until the call returns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from benchmarks.case import Case, Cost, Counted, Setup, Timed
from benchmarks.memory import peak_bytes
from benchmarks.sweep.compiled import compiled
from benchmarks.sweep.errors import TWICE_THE_BASELINE, worst_error
from benchmarks.sweep.plan import COMPILE, NOT_REHEARSED, OURS, LeftOut, Plan, Settings, refusal

__all__ = ["EAGER", "Function", "Inputs", "Op", "Pass", "Step", "op_plans"]

EAGER = "eager"

Pass: TypeAlias = Literal["forward", "backward"]
_PASSES: tuple[Pass, ...] = ("forward", "backward")

# Tensors that ask for gradients, in their order, to one tensor or several.
Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An operation at one size.

    Args:
        name: of its cases, around the pass: "norm" and "rms_d2048" give norm_forward_rms_d2048.
        title: what it is and how large, for people.
        definition: eager; differentiable in any precision.
        ours: the same on our kernels.
        draw: tensors that it is a function of, then the gradients of its outputs; in the settings' dtype.
        cost: of each pass.
        others: further contestants.
        absent: contestants that are not here, and why.
    """

    name: tuple[str, str]
    title: str
    definition: Function
    ours: Function
    draw: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    cost: Mapping[Pass, Cost]
    others: Mapping[str, Function] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


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
    inputs = Inputs(op.definition, *op.draw())
    reasons = dict(op.absent)
    entrants: dict[str, Function] = {**op.others, OURS: op.ours}
    if settings.kind == "cuda":
        entrants = {COMPILE: compiled(op.definition), **entrants}
    else:
        reasons[COMPILE] = NOT_REHEARSED
    setups: dict[str, Setup] = {EAGER: partial(Step, inputs, op.definition, way)}
    for label, function in entrants.items():
        setup = partial(Step, inputs, function, way)
        if reason := refusal(lambda setup=setup: setup()(), settings.kind):  # type: ignore[misc]
            reasons[label] = reason
        else:
            setups[label] = setup
    left_out = [LeftOut(name, label, reason) for label, reason in reasons.items()]
    return _case(name, settings, op, way, setups), left_out


def _case(name: str, settings: Settings, op: Op, way: Pass, setups: dict[str, Setup]) -> Case:
    cost = op.cost[way]
    if cost.flops:
        rate = Timed("throughput", "TFLOP/s", "higher", lambda seconds: cost.flops / seconds / 1e12)
    else:
        rate = Timed("bandwidth", "GB/s", "higher", lambda seconds: cost.bytes / seconds / 1e9)
    return Case(
        name=name,
        title=f"{op.title}, {way}, {settings.dtype_name}",
        baseline=EAGER,
        contestants=setups,
        gates=(TWICE_THE_BASELINE,),
        metrics=(
            Timed("call_ms"),
            rate,
            Counted("peak_bytes", "bytes", lambda step: peak_bytes(step, settings.device)),
        ),
        cost=cost,
        device=settings.kind,
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold=True,
    )
