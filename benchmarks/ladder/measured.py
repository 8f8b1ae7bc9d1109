"""A ladder on a device: gates first, then each rung in a process of its own, beside what is planned of it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch

from benchmarks.environment import origin
from benchmarks.ladder.planned import plan_peak, quiet
from benchmarks.ladder.result import SCHEMA_VERSION, Gate, MeasuredLadder, MeasuredRow, Missing
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.worker import Answer, Workers, describe
from benchmarks.ladder.workloads import WORKLOADS, tiny
from benchmarks.record import Device

__all__ = ["Wanted", "measure"]

_Rung = tuple[str, str, int]  # workload, rung, world
_Plans = dict[_Rung, "Future[tuple[int, int]]"]
_Part = Gate | MeasuredRow | Missing


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, in this order.

    Attributes:
        workloads, worlds, rungs: names, and numbers of GPUs.
        rehearse: tiny models on the CPU.
        budget_s: no rung begins later, nor if it would end later.
        jobs: processes that plan meanwhile.
    """

    workloads: Sequence[str]
    worlds: Sequence[int]
    rungs: Sequence[str]
    rehearse: bool
    budget_s: float
    jobs: int

    @property
    def kind(self) -> str:
        """Of the device."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def all(self) -> list[_Rung]:
        """Every rung of every workload on every world."""
        return [(load, rung, n) for load in self.workloads for n in self.worlds for rung in self.rungs]


def measure(wanted: Wanted, argv: Sequence[str], note: Callable[[MeasuredLadder], object]) -> MeasuredLadder:
    """Measure all rungs that the time allows.

    Args:
        argv: arguments of `python -m benchmarks.ladder`, for the record.
        note: is given what there is after every rung.
    """
    if not (wanted.rehearse or torch.cuda.is_available()):
        raise ValueError("--measure: there is no CUDA device; add --rehearse for tiny models on the CPU")
    # The CPU computes with PyTorch's references, not in the interpreter, whose products in bf16 are wrong.
    os.environ.pop("TRITON_INTERPRET", None)
    deadline = time.perf_counter() + wanted.budget_s
    with Workers() as workers:
        # Where it is a GPU, a process that stays would keep a context on it.
        found = describe("cpu") if wanted.rehearse else workers.ask("describe", kind=wanted.kind)
        if "failed" in found:
            raise ValueError(f"--measure: the device cannot be described: {found['failed']}")
        whole = MeasuredLadder(
            kind="rehearsal" if wanted.rehearse else "measured",
            schema_version=SCHEMA_VERSION,
            device=Device(**found["device"]),
            rows=(),
            gates=(),
            missing=(),
            **origin("benchmarks.ladder", argv),
        )
        with ProcessPoolExecutor(wanted.jobs, get_context("spawn"), initializer=_behind) as pool:
            plans = {one: pool.submit(_plan, *one, found["arch"], wanted.rehearse) for one in wanted.all}
            for part in _parts(wanted, workers, plans, deadline):
                whole = _with(whole, part)
                note(whole)
            pool.shutdown(cancel_futures=True)
    return whole


def _with(whole: MeasuredLadder, part: _Part) -> MeasuredLadder:
    match part:
        case Gate():
            return replace(whole, gates=(*whole.gates, part))
        case MeasuredRow():
            return replace(whole, rows=(*whole.rows, part))
        case Missing():
            return replace(whole, missing=(*whole.missing, part))


def _parts(wanted: Wanted, workers: Workers, plans: _Plans, deadline: float) -> Iterator[_Part]:
    for workload in wanted.workloads:
        gates: list[Gate] = []
        if time.perf_counter() < deadline:
            gates, failure = _gates(wanted, workers, workload)
            yield from gates
            yield from failure
        timed = bool(gates) and all(gate.passed for gate in gates)
        longest = 0.0  # a rung that may not end in time does not begin
        for one in (one for one in wanted.all if one[0] == workload):
            begin = time.perf_counter()
            if begin + longest < deadline:
                yield _row(wanted, workers, plans[one], one, timed)
                longest = max(longest, time.perf_counter() - begin)
            else:
                yield Missing(*one, f"the {wanted.budget_s:.0f} s of the run would not do", failed=False)


def _gates(wanted: Wanted, workers: Workers, workload: str) -> tuple[list[Gate], list[Missing]]:
    answer = workers.ask("gate", workload=workload, rungs=list(wanted.rungs), kind=wanted.kind)
    if "failed" in answer:
        return [], [Missing(workload, "", 1, f"gates: {answer['failed']}", failed=True)]
    return [Gate(**one) for one in answer["gates"]], []


def _row(wanted: Wanted, workers: Workers, plan: "Future[tuple[int, int]]", one: _Rung, timed: bool) -> _Part:
    workload, rung, world = one
    answer: Answer = workers.ask(
        "measure", workload=workload, rung=rung, world=world, kind=wanted.kind, small=wanted.rehearse
    )
    if "failed" in answer:
        return Missing(*one, answer["failed"], failed=True)
    try:
        planned_bytes, host_bytes = plan.result()
    except Exception as error:  # the other rungs are measured all the same
        return Missing(*one, f"cannot be planned: {error}", failed=True)
    return MeasuredRow(
        *one,
        planned_bytes,
        host_bytes,
        allocated_bytes=answer.get("allocated_bytes"),
        reserved_bytes=answer.get("reserved_bytes"),
        steps_s=tuple(answer.get("steps_s", ())) if timed else (),
        oom=answer.get("oom", ""),
    )


def _behind() -> None:
    """Plans run beside what is measured: behind it, and without its GPU."""
    quiet()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(10)


def _plan(workload: str, rung: str, world: int, arch: str, small: bool) -> tuple[int, int]:
    """Planned peaks of the device and of the host's memory."""
    chosen = WORKLOADS[workload]
    peak = plan_peak(tiny(chosen) if small else chosen, RUNGS[rung], world, arch)
    return peak.nbytes, peak.host_bytes
