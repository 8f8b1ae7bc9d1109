"""A case: what is compared, what must hold before a speed-up may be reported, what the work must cost.

Adding one is adding one file to `benchmarks/cases/` that defines `CASE`, which the command line and
pytest-benchmark both read. See docs/benchmarks.md.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from benchmarks import cases

# What a contestant's setup returns: a callable that does the work once. It may carry more (a model, a
# result) for the case's own gates and counted metrics to read.
Work: TypeAlias = Callable[[], object]
Setup: TypeAlias = Callable[[], Work]
Better: TypeAlias = Literal["lower", "higher"]


@dataclass(frozen=True)
class Gate:
    """A correctness check: a contestant whose error exceeds the limit, or is NaN, gets no ratio."""

    name: str
    limit: float
    error: Callable[[Any, Any], float]
    """(the contestant's work, the baseline's work) -> error; called before anything is timed."""


def _milliseconds(seconds: float) -> float:
    return seconds * 1e3


@dataclass(frozen=True)
class Timed:
    """A metric that follows from the time of one call, sampled once a round."""

    name: str
    unit: str = "ms"
    better: Better = "lower"
    of_seconds: Callable[[float], float] = _milliseconds


@dataclass(frozen=True)
class Counted:
    """A metric that is read off the work, once, after the timing."""

    name: str
    unit: str
    of_work: Callable[[Any], float]
    better: Better = "lower"


@dataclass(frozen=True)
class Cost:
    """The two numbers first: what any implementation must compute and must move."""

    flops: int
    bytes: int
    reason: str
    """What was counted, in a line."""
    dtype: str = "float32"
    """What the arithmetic is done in (a torch dtype): sets the rate that the FLOPs are held against."""


@dataclass(frozen=True)
class Case:
    """One comparison. `contestants` maps a label to its setup; `baseline` names one of them."""

    name: str
    title: str
    baseline: str
    contestants: Mapping[str, Setup]
    gates: tuple[Gate, ...]
    metrics: tuple[Timed | Counted, ...]
    cost: Cost
    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 15
    warmup: int = 2
    cold: bool = False
    """Time the device alone, from an empty cache, launches queued ahead: for work of a few kernels."""
    queue_ms: float = 1.0
    """How long the host takes at most to queue a cold call."""

    def __post_init__(self) -> None:
        if self.baseline not in self.contestants:
            raise ValueError(f"baseline = {self.baseline!r}: must be one of {list(self.contestants)}")
        if self.rounds < 1 or self.warmup < 0:
            raise ValueError(f"rounds = {self.rounds}, warmup = {self.warmup}: need rounds >= 1, warmup >= 0")

    @property
    def fits(self) -> bool:
        """Whether this machine has the device that the case needs."""
        return self.device == "cpu" or torch.cuda.is_available()


def discover() -> dict[str, Case]:
    """Every case in `benchmarks/cases/`, by name; a file must bear its case's name."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(cases.__path__):
        case: Case = importlib.import_module(f"{cases.__name__}.{module.name}").CASE
        if case.name != module.name:
            raise ValueError(
                f"name = {case.name!r}: the case in {module.name}.py must be named {module.name!r}"
            )
        found[case.name] = case
    return found
