"""How far results are from the truth, and the gate that holds a contestant to the baseline's distance."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Gate

__all__ = ["TWICE_THE_BASELINE", "error_ratio", "relative_error", "worst_error"]


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖, in fp64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def worst_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest relative error of (got, want); NaN where one of them is."""
    return float(torch.tensor([relative_error(got, want) for got, want in pairs]).max())


def error_ratio(work: Any, baseline: Any) -> float:
    """How many times as far from the truth as the baseline; each from its own truth."""
    return float(work.error()) / float(baseline.error())


TWICE_THE_BASELINE = Gate("error over the baseline's", 2.0, error_ratio)
