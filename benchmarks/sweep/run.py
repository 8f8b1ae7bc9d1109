"""Run plans within a budget of time, and keep all that was measured in one file.

Small cases come first. What does not fit the budget, or fails, is left out by name. The file is written anew
after every case, so that a run that is cut short keeps what it has.
"""

import gc
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.environment import measured_rates
from benchmarks.harness import run as measure
from benchmarks.record import read_record, write_record
from benchmarks.result import Result
from benchmarks.sweep.plan import Kind, LeftOut, Plan

__all__ = ["SCHEMA_VERSION", "Sweep", "read_sweep", "run_plans"]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sweep:
    """Results of many sizes in one run."""

    schema_version: int = field(metadata={"help": "version of this format"})
    results: tuple[Result, ...] = field(metadata={"help": "a case each, smallest first"})
    left_out: tuple[LeftOut, ...] = field(metadata={"help": "what was not measured, and why"})
    seconds: float = field(metadata={"help": "how long the run took, compilers included"})


def run_plans(plans: Iterable[Plan], kind: Kind, path: Path, budget_s: float = 540.0) -> Sweep:
    """Measure every plan, the smallest first; write the sweep to `path` as JSON.

    Args:
        kind: on the CPU, rates are measured once, for all cases.
        budget_s: no case starts later than this many seconds after the first.
    """
    started = time.perf_counter()
    # A GPU's rates drift with its clocks, so that every case measures them again.
    rates = measured_rates("cpu", torch.float32) if kind == "cpu" else None
    results: list[Result] = []
    left_out: list[LeftOut] = []
    for plan in sorted(plans, key=lambda plan: plan.flops):
        spent = time.perf_counter() - started
        if spent > budget_s:
            left_out.append(LeftOut(plan.name, "", f"the {budget_s:.0f} s of the run were over"))
        else:
            result, missing = _measure(plan, rates)
            results += result
            left_out += missing
        _write(Sweep(SCHEMA_VERSION, tuple(results), tuple(left_out), spent), path)
    return _write(Sweep(SCHEMA_VERSION, tuple(results), tuple(left_out), time.perf_counter() - started), path)


def read_sweep(path: Path) -> Sweep:
    """Read and check what `run_plans` wrote.

    Raises:
        ValueError: not a file of this format; names the file and the first fault.
    """
    return read_record(Sweep, path, SCHEMA_VERSION)


def _measure(plan: Plan, rates: tuple[float, float] | None) -> tuple[list[Result], list[LeftOut]]:
    gc.collect()  # what the case before has left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    try:
        case, missing = plan.make()
        results = [measure(case, rates=rates)]
    except Exception as error:  # out of memory, a compiler's fault: the other sizes are measured all the same
        log.exception("%s failed", plan.name)
        return [], [LeftOut(plan.name, "", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")]
    log.info("%s: %.1f s", plan.name, time.perf_counter() - begin)
    for one in missing:
        log.info("%s: %s left out: %s", plan.name, one.contestant, one.reason)
    return results, missing


def _write(sweep: Sweep, path: Path) -> Sweep:
    write_record(sweep, path)
    return sweep
