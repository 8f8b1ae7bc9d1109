"""The picture of a ladder: what each rung holds, by kind, a panel a workload and world."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ladder.result import Ladder, Row
from benchmarks.ladder.table import worlds
from benchmarks.ladder.workloads import WORKLOADS
from dtrain.plan.peak import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_GIB = 2**30


def plot(ladder: Ladder, path: Path) -> None:
    """Draw to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(worlds(ladder))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.4 * rows + 1), layout="constrained", dpi=100)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _panel(ax, panel, ladder)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"Planned for {ladder.gpu}, not measured: what a GPU holds at its peak; line: its memory")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: "Axes", rows: list[Row], ladder: Ladder) -> None:
    names = [row.rung for row in rows]
    left = [0.0] * len(rows)
    for number, kind in enumerate(KINDS):
        sizes = [row.kinds.get(kind, 0) / _GIB for row in rows]
        if any(sizes):
            axes.barh(names, sizes, left=left, label=kind, color=f"C{number}")
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=7)
    axes.axvline(ladder.memory_bytes / _GIB, color="black", linewidth=0.8)
    axes.set_xlim(0, max(left) * 1.12)
    axes.invert_yaxis()
    axes.set_title(f"{WORKLOADS[rows[0].workload].title}, rank 0 of {rows[0].world}", fontsize=9)
    axes.set_xlabel("GiB", fontsize=8)
    axes.tick_params(labelsize=8)
