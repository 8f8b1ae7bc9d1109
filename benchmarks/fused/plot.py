"""The picture of the fused ops: what share of a copy's bandwidth, or of a product's rate, each makes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import Result
from benchmarks.sweep.plan import OURS
from benchmarks.sweep.run import Sweep
from benchmarks.sweep.table import red, time_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "share"]


def share(result: Result, name: str) -> float:
    """The work's floor in bytes, or in FLOPs where it has any, over the time that it took."""
    floor, seconds = result.floor, time_ms(result, name).value / 1e3
    if floor.flops:
        return floor.flops / floor.flops_per_s / seconds
    return floor.bytes / floor.bytes_per_s / seconds


def plot(sweep: Sweep, path: Path) -> None:
    """A panel for what a copy bounds, one for what products bound; every contestant whose gates are green."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    panels = {
        "share of a large copy's bandwidth": [r for r in sweep.results if not r.floor.flops],
        "share of a large product's rate": [r for r in sweep.results if r.floor.flops],
    }
    panels = {title: results for title, results in panels.items() if results}
    names = list(dict.fromkeys(name for r in sweep.results for name in r.contestants))
    names.sort(key=lambda name: (not name.startswith(OURS), name))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    bars = [sum(len(r.contestants) + 1 for r in results) for results in panels.values()]
    figure, axes = pyplot.subplots(
        max(1, len(panels)),
        1,
        figsize=(9, 1.2 + 0.7 * len(panels) + 0.13 * sum(bars)),
        squeeze=False,
        height_ratios=bars or None,
        layout="constrained",
    )
    for axis, (title, results) in zip(axes[:, 0], panels.items(), strict=False):
        _panel(axis, title, results, colors)
    handles = [patches.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside upper center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: "Axes", title: str, results: Sequence[Result], colors: Mapping[str, str]) -> None:
    """Bars from left to right, cases from top to bottom."""
    at, ticks = 0.0, []
    for result in results:
        shown = [name for name in colors if name in result.contestants.keys() - red(result)]
        for i, name in enumerate(shown):
            axis.barh(at + i, share(result, name), 0.9, color=colors[name])
        ticks.append((at + (len(shown) - 1) / 2, result.case))
        at += len(shown) + 1
    axis.set_yticks([place for place, _ in ticks], [case for _, case in ticks], fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.set_ylim(at - 1, -1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(axis="x", alpha=0.3)
