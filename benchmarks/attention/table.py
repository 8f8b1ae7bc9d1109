"""A sweep as a short table in plain text, and as a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.attention.operation import OURS
from benchmarks.attention.plan import LeftOut
from benchmarks.attention.suite import Sweep
from benchmarks.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "sound", "table"]


def sound(sweep: Sweep) -> bool:
    """Whether our kernels ran and are right: in every case that was measured, and in at least one."""
    return bool(sweep.results) and all(
        OURS in result.contestants and not any(name.startswith(OURS) for name in _red(result))
        for result in sweep.results
    )


def table(sweep: Sweep) -> str:
    """A line a case: our time, what it makes of the device, and how many times longer the others take.

    A ratio is the median over rounds of their time by ours, inside a round. A contestant behind a red gate
    has "red" in its place.
    """
    lines = []
    for result in sweep.results:
        red = _red(result)
        cells = [f"{name} {'red' if name in red else _ratio(result, name)}" for name in _others(result)]
        lines.append(f"{result.case:44} {_ours(result):34} | {' | '.join(cells)}")
    gone = [f"left out: {x.case} {x.contestant}: {x.reason}" for x in _brief(sweep)]
    return "\n".join([*lines, *gone, f"{len(sweep.results)} cases in {sweep.seconds:.0f} s"])


def _ours(result: Result) -> str:
    if OURS not in result.contestants:
        return f"{OURS} did not run"
    metrics = result.contestants[OURS]
    words = [f"{metrics['call_ms'].value:9.3f} ms"]
    if OURS in _red(result):
        words.append("RED")
    floor, seconds = result.floor, metrics["call_ms"].value / 1e3
    # What bounds the work, and the share of what this device was just measured to give.
    if floor.flops:
        flops_per_s = floor.flops / seconds
        words.append(f"{flops_per_s / 1e12:7.1f} TFLOP/s {flops_per_s / floor.flops_per_s:4.0%}")
    else:
        bytes_per_s = floor.bytes / seconds
        words.append(f"{bytes_per_s / 1e12:7.2f} TB/s    {bytes_per_s / floor.bytes_per_s:4.0%}")
    return " ".join(words)


def _others(result: Result) -> Iterator[str]:
    return (name for name in result.contestants if name != OURS)


def _red(result: Result) -> set[str]:
    return {gate.contestant for gate in result.gates if not gate.passed}


def _ratio(result: Result, name: str) -> str:
    if OURS not in result.contestants:
        return f"{result.contestants[name]['call_ms'].value:.3f} ms"
    pairs = zip(_samples(result, name), _samples(result, OURS), strict=True)
    return f"×{median(theirs / ours for theirs, ours in pairs):.2f}"


def _samples(result: Result, name: str) -> Sequence[float]:
    return result.contestants[name]["call_ms"].samples


def _brief(sweep: Sweep) -> Iterator[LeftOut]:
    """One line for the same reason in many cases would be many: the first case stands for the rest."""
    seen = set()
    for one in sweep.left_out:
        if (one.contestant, one.reason) not in seen:
            seen.add((one.contestant, one.reason))
            yield one


def plot(sweep: Sweep, path: Path) -> None:
    """TFLOP/s by length, a panel for each pass and head dim; every contestant whose gates are green."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Result]] = {}
    for result in sweep.results:
        if result.case.startswith("attention_dense"):
            _, _, way, head_dim, _ = result.case.split("_")
            panels.setdefault((way, head_dim), []).append(result)
    ways, dims = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    figure, axes = pyplot.subplots(
        len(ways), len(dims), figsize=(4 * len(dims), 3.2 * len(ways)), squeeze=False, sharey=True
    )
    for (way, head_dim), results in panels.items():
        _panel(axes[ways.index(way)][dims.index(head_dim)], f"{way}, D = {head_dim[1:]}", results)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: "Axes", title: str, results: Sequence[Result]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        tokens = int(result.case.rpartition("_n")[2])
        for name in result.contestants.keys() - _red(result):
            throughput = result.contestants[name]["throughput"].value
            lines.setdefault(name, []).append((tokens, throughput))
    for name in sorted(lines):
        axis.plot(*zip(*sorted(lines[name]), strict=True), marker="o", label=name)
    axis.set(title=title, xscale="log", xlabel="tokens", ylabel="TFLOP/s")
    axis.legend(fontsize=7)
