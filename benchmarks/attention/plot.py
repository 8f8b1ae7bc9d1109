"""The picture of attention: throughput by length."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result import Result
from benchmarks.sweep.run import Sweep
from benchmarks.sweep.table import red

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]


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
        for name in result.contestants.keys() - red(result):
            throughput = result.contestants[name]["throughput"].value
            lines.setdefault(name, []).append((tokens, throughput))
    for name in sorted(lines):
        axis.plot(*zip(*sorted(lines[name]), strict=True), marker="o", label=name)
    axis.set(title=title, xscale="log", xlabel="tokens", ylabel="TFLOP/s")
    axis.legend(fontsize=7)
