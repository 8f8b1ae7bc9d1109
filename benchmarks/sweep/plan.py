"""What a sweep measures: cases that are built when their turn comes, and what is left out."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from benchmarks.case import Case

__all__ = ["COMPILE", "NOT_REHEARSED", "OURS", "Kind", "LeftOut", "Plan", "Settings", "refusal"]

Kind = Literal["cpu", "cuda"]

OURS = "dtrain"
COMPILE = "torch.compile"
NOT_REHEARSED = "not rehearsed on the CPU"


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why."""

    case: str = field(metadata={"help": "name of the case"})
    contestant: str = field(metadata={"help": "who does not serve there; empty: the whole case"})
    reason: str = field(metadata={"help": "what it said"})


@dataclass(frozen=True)
class Plan:
    """A case that is built, inputs and all, only when its turn comes.

    Args:
        flops: a measure of how long it takes: small cases come first, those without any before them all.
        make: probes who serves; the case of those who do, and those left out.
    """

    name: str
    flops: int
    make: Callable[[], tuple[Case, list[LeftOut]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the cases of a sweep have in common; on the CPU they rehearse, at tiny sizes."""

    kind: Kind
    dtype: torch.dtype
    rounds: int
    warmup: int = 2

    @property
    def device(self) -> str:
        return self.kind

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def refusal(call: Callable[[], object], kind: str) -> str:
    """Why the call cannot be made, by what it raised and warned of; empty where it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
            if kind == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # each raises what it likes, and none may end the others' run
            reasons = [str(error), *(str(w.message) for w in said)]
            return f"{type(error).__name__}: " + "; ".join(
                r.strip().splitlines()[0] for r in reasons if r.strip()
            )
    return ""
