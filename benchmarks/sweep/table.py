"""A sweep as a short table in plain text, and whether it may be relied on."""

from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.result import Measurement, Result
from benchmarks.sweep.plan import OURS, LeftOut
from benchmarks.sweep.run import Sweep

__all__ = ["red", "sound", "table", "time_ms"]


def sound(sweep: Sweep) -> bool:
    """Whether our kernels ran and are right: in every case that was measured, and in at least one."""
    return bool(sweep.results) and all(
        OURS in result.contestants and not any(name.startswith(OURS) for name in red(result))
        for result in sweep.results
    )


def table(sweep: Sweep) -> str:
    """A line a case: our time, what it makes of the device, and how many times longer the others take.

    A ratio is the median over rounds of their time by ours, inside a round. A contestant behind a red gate
    has "red" in its place. Where peak memory was measured, ours stands there too, and theirs by ours.
    """
    lines = []
    for result in sweep.results:
        wrong = red(result)
        cells = [f"{name} {'red' if name in wrong else _ratio(result, name)}" for name in _others(result)]
        lines.append(f"{result.case:44} {_ours(result):34} | {' | '.join(cells)}")
    gone = [f"left out: {x.case} {x.contestant}: {x.reason}" for x in _brief(sweep)]
    return "\n".join([*lines, *gone, f"{len(sweep.results)} cases in {sweep.seconds:.0f} s"])


def red(result: Result) -> set[str]:
    """Contestants with a gate that did not pass."""
    return {gate.contestant for gate in result.gates if not gate.passed}


def time_ms(result: Result, name: str) -> Measurement:
    return result.contestants[name]["call_ms"]


def _ours(result: Result) -> str:
    if OURS not in result.contestants:
        return f"{OURS} did not run"
    ms = time_ms(result, OURS).value
    words = [f"{ms:9.3f} ms"]
    if OURS in red(result):
        words.append("RED")
    floor, seconds = result.floor, ms / 1e3
    # What bounds the work, and the share of what this device was just measured to give.
    if floor.flops:
        flops_per_s = floor.flops / seconds
        words.append(f"{flops_per_s / 1e12:7.1f} TFLOP/s {flops_per_s / floor.flops_per_s:4.0%}")
    else:
        bytes_per_s = floor.bytes / seconds
        words.append(f"{bytes_per_s / 1e12:7.2f} TB/s    {bytes_per_s / floor.bytes_per_s:4.0%}")
    if (peak := _peak_bytes(result, OURS)) is not None:
        words.append(f"{peak / 2**30:6.2f} GiB")
    return " ".join(words)


def _others(result: Result) -> Iterator[str]:
    return (name for name in result.contestants if name != OURS)


def _ratio(result: Result, name: str) -> str:
    if OURS not in result.contestants:
        return f"{time_ms(result, name).value:.3f} ms"
    pairs = zip(_samples(result, name), _samples(result, OURS), strict=True)
    ratio = f"×{median(theirs / ours for theirs, ours in pairs):.2f}"
    theirs, ours = (_peak_bytes(result, x) for x in (name, OURS))
    return f"{ratio}, memory ×{theirs / ours:.2f}" if theirs and ours else ratio


def _peak_bytes(result: Result, name: str) -> float | None:
    measured = result.contestants[name].get("peak_bytes")
    return None if measured is None else measured.value


def _samples(result: Result, name: str) -> Sequence[float]:
    return time_ms(result, name).samples


def _brief(sweep: Sweep) -> Iterator[LeftOut]:
    """One line for the same reason in many cases would be many: the first case stands for the rest."""
    seen = set()
    for one in sweep.left_out:
        if (one.contestant, one.reason) not in seen:
            seen.add((one.contestant, one.reason))
            yield one
