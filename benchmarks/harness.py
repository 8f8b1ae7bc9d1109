"""Run a case: gates, then interleaved timing, then what is counted, then ratios.

Machines drift (clocks, neighbours), so a contestant is compared with the baseline only inside a round, in
which each runs once: ratio = median over rounds of (baseline's sample / contestant's sample). Every other
round runs in reverse order, which cancels a linear drift inside rounds.
"""

import gc
import logging
import math
import sys
import time
from collections.abc import Mapping

import torch

from benchmarks.case import Case, Timed, Work
from benchmarks.environment import measured_on, measured_rates, seconds
from benchmarks.result import SCHEMA_VERSION, Floor, GateResult, Measurement, Ratio, Result
from benchmarks.stats import estimate

log = logging.getLogger(__name__)


def run(case: Case, rounds: int | None = None, rates: tuple[float, float] | None = None) -> Result:
    """Measure one case on this machine.

    Args:
        case: what to measure.
        rounds: timed rounds; the case's own number if None.
        rates: what `measured_rates` gave before, for its floor; measured anew if None.

    Raises:
        ValueError: the case needs a device that is not here.
    """
    if not case.fits:
        raise ValueError(
            f"case = {case.name}: needs a {case.device} device and there is none; choose another case"
        )
    place = measured_on(case.device, "benchmarks", sys.argv[1:])
    rounds = case.rounds if rounds is None else rounds
    floor = _floor(case, rates)
    works = {name: setup() for name, setup in case.contestants.items()}
    gates = check_gates(case, works)
    wall, cpu = time.perf_counter(), time.process_time()
    times = _time_interleaved(case, works, rounds)
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    contestants = {name: _measure(case, works[name], times[name]) for name in works}
    return Result(
        schema_version=SCHEMA_VERSION,
        case=case.name,
        title=case.title,
        baseline=case.baseline,
        contestants=contestants,
        ratios=_ratios(case, contestants, gates),
        gates=gates,
        floor=floor,
        threads=torch.get_num_threads(),
        cpu_share=cpu_share,
        rounds=rounds,
        warmup=case.warmup,
        **place,
    )


def check_gates(case: Case, works: Mapping[str, Work]) -> tuple[GateResult, ...]:
    """Every gate for every contestant but the baseline."""
    results = []
    for gate in case.gates:
        for name in (name for name in works if name != case.baseline):
            error = float(gate.error(works[name], works[case.baseline]))
            finite = error if math.isfinite(error) else None
            results.append(GateResult(gate.name, name, error <= gate.limit, finite, gate.limit))
    for red in (gate for gate in results if not gate.passed):
        log.error("%s: gate %s is red (%s > %s): no ratio", red.contestant, red.name, red.error, red.limit)
    return tuple(results)


def _floor(case: Case, rates: tuple[float, float] | None) -> Floor:
    cost = case.cost
    flops_per_s, bytes_per_s = rates or measured_rates(case.device, getattr(torch, cost.dtype))
    floor_ms = 1e3 * max(cost.flops / flops_per_s, cost.bytes / bytes_per_s)
    return Floor(cost.flops, cost.bytes, cost.reason, flops_per_s, bytes_per_s, floor_ms)


def _time_interleaved(case: Case, works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    warmup = case.warmup
    for index in range(warmup + rounds):
        for name in list(works)[:: -1 if index % 2 else 1]:
            if not case.cold:
                gc.collect()  # here, so that it does not strike inside the timed call
            taken = seconds(works[name], case.device, case.cold, case.queue_ms)
            if index >= warmup:
                times[name].append(taken)
        level = logging.DEBUG if case.cold else logging.INFO
        phase = "warm-up" if index < warmup else "timed"
        log.log(level, "%s round %d of %d", phase, index + 1, warmup + rounds)
    return times


def _measure(case: Case, work: Work, times: list[float]) -> dict[str, Measurement]:
    measured = {}
    for metric in case.metrics:
        if isinstance(metric, Timed):
            samples = tuple(metric.of_seconds(taken) for taken in times)
        else:
            samples = (float(metric.of_work(work)),)
        low, value, high = estimate(samples)
        measured[metric.name] = Measurement(value, low, high, metric.unit, metric.better, samples)
    return measured


def _ratios(
    case: Case, contestants: Mapping[str, dict[str, Measurement]], gates: tuple[GateResult, ...]
) -> tuple[Ratio, ...]:
    red = {gate.contestant for gate in gates if not gate.passed}
    base = contestants[case.baseline]
    ratios = []
    for name in (name for name in contestants if name not in red | {case.baseline}):
        for metric, ours in contestants[name].items():
            worse, better = (base[metric], ours) if ours.better == "lower" else (ours, base[metric])
            if 0 in better.samples:
                log.warning("%s: %s is 0 in one of the two: no ratio", name, metric)
                continue
            gains = [w / b for w, b in zip(worse.samples, better.samples, strict=True)]
            low, value, high = estimate(gains)
            ratios.append(Ratio(name, metric, value, low, high))
    return tuple(ratios)
