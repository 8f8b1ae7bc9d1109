"""A run as a table in plain text, one a world size."""

from collections.abc import Iterator

from benchmarks.result import Measurement
from benchmarks.saving.result import SavingRun, WorldResult

__all__ = ["TITLES", "faults", "gain_words", "table"]

TITLES = {
    "stall_ms": "stall",
    "stall_cpu_ms": "its CPU time",
    "written_ms": "until written",
    "load_ms": "load",
    "quiet_ms": "step",
    "beside_ms": "step beside",
    "lost_ms": "lost",
    "disk_bytes": "on disk",
}


def table(run: SavingRun) -> str:
    """Medians, with plain's time over ours; then what the least work takes."""
    head = (
        f"{run.parameters:,} parameters with moments and averages, fp32; {run.device.count} cores of "
        f"{run.device.name}, {run.filesystem}, torch {run.versions['torch']}; load {run.load_average:.1f} "
        f"before, {run.seconds:.0f} s"
    )
    return "\n".join([head, *(line for world in run.worlds for line in _world(world))])


def _world(world: WorldResult) -> Iterator[str]:
    yield ""
    yield (
        f"{world.ranks} rank(s), {world.state_bytes / world.ranks / 1e6:,.0f} MB each, "
        f"{world.rounds} rounds; others took {world.others_cpu_share:.0%} of the CPU"
    )
    width = max(len(name) for name in world.contestants)
    yield " " * width + "".join(f"{title:>15}" for title in TITLES.values())
    for name, metrics in world.contestants.items():
        if metrics:
            yield f"{name:{width}}" + "".join(f"{_words(metrics[m], world):>15}" for m in TITLES)
    gains = [gain_words(world, metric) for metric in TITLES]
    yield f"{'gain':{width}}" + "".join(f"{gain:>15}" for gain in gains)
    said = ", ".join(f"{name} {limit.value:.0f} ms" for name, limit in world.limits.items())
    yield f"as many bytes by one plain call a rank: {said}"
    yield from faults(world)


def faults(world: WorldResult) -> Iterator[str]:
    """One line a red gate."""
    for gate in world.gates:
        if not gate.passed:
            yield f"RED {gate.contestant}, {world.ranks} rank(s): {gate.name}: {gate.error:,.0f}; no figures"


def gain_words(world: WorldResult, metric: str) -> str:
    """Plain's time over ours; empty where there is none."""
    ratio = world.ratio(metric)
    return "" if ratio is None else f"×{ratio.value:.2f}"


def _words(measured: Measurement, world: WorldResult) -> str:
    if measured.unit == "bytes":
        return f"{measured.value / world.state_bytes:.4f} floor"
    return f"{measured.value:,.0f} ms"
