"""Who takes part in a case, and the case of those who serve."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.case import Case, Cost, Counted, Gate, Setup, Timed
from benchmarks.memory import peak_bytes
from benchmarks.sweep.compiled import compiled
from benchmarks.sweep.errors import TWICE_THE_BASELINE
from benchmarks.sweep.plan import COMPILE, NOT_REHEARSED, OURS, LeftOut, Settings, refusal

__all__ = ["EAGER", "Function", "Rivals", "contest"]

EAGER = "eager"

# Of tensors, in their order, to one tensor or several.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Rivals:
    """Functions that do the same.

    Args:
        definition: the baseline, run eagerly; it is compiled too, and in fp64 it is the truth.
        ours: on our kernels.
        others: further contestants.
        absent: contestants that are not here, and why.
    """

    definition: Function
    ours: Function
    others: Mapping[str, Function] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def entrants(self, settings: Settings) -> dict[str, Function]:
        """By label, the baseline first."""
        compiler = {COMPILE: compiled(self.definition)} if settings.kind == "cuda" else {}
        return {EAGER: self.definition, **compiler, **self.others, OURS: self.ours}

    def missing(self, settings: Settings) -> dict[str, str]:
        """By label, why it does not take part."""
        return {**self.absent, **({} if settings.kind == "cuda" else {COMPILE: NOT_REHEARSED})}


def contest(
    name: str,
    title: str,
    settings: Settings,
    works: Mapping[str, Setup],
    missing: Mapping[str, str],
    cost: Cost,
    gates: tuple[Gate, ...] = (TWICE_THE_BASELINE,),
    metrics: tuple[Timed, ...] = (),
    cold: bool = True,
    queue_ms: float = 1.0,
) -> tuple[Case, list[LeftOut]]:
    """The case of all who can do the work once; the others are left out by what they say.

    Args:
        works: the baseline first, which is not asked.
        missing: who is known not to be here, and why.
        cost: with FLOPs, peak memory is measured; without, the work is held against a copy.
        metrics: besides time and rate.
        cold, queue_ms: see `Case`.
    """
    reasons = dict(missing)
    serving: dict[str, Setup] = {}
    for label, setup in works.items():
        reason = refusal(lambda setup=setup: setup()(), settings.kind) if serving else ""  # type: ignore[misc]
        if reason:
            reasons[label] = reason
        else:
            serving[label] = setup
    case = Case(
        name=name,
        title=f"{title}, {settings.dtype_name}",
        baseline=next(iter(serving)),
        contestants=serving,
        gates=gates,
        metrics=(Timed("call_ms"), *_rates(cost, settings), *metrics),
        cost=replace(cost, dtype=settings.dtype_name),
        device=settings.kind,
        rounds=settings.rounds,
        warmup=settings.warmup,
        cold=cold,
        queue_ms=queue_ms,
    )
    return case, [LeftOut(name, label, reason) for label, reason in reasons.items()]


def _rates(cost: Cost, settings: Settings) -> tuple[Timed | Counted, ...]:
    if not cost.flops:
        return (Timed("bandwidth", "GB/s", "higher", lambda seconds: cost.bytes / seconds / 1e9),)
    return (
        Timed("throughput", "TFLOP/s", "higher", lambda seconds: cost.flops / seconds / 1e12),
        Counted("peak_bytes", "bytes", lambda work: peak_bytes(work, settings.device)),
    )
