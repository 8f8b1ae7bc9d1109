"""The picture of a ladder: what each rung holds, by kind, a panel a workload and world."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ladder.result import Ladder, MeasuredLadder, MeasuredRow, Row
from benchmarks.ladder.table import worlds
from benchmarks.ladder.workloads import WORKLOADS
from dtrain.plan.peak import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "plot_measured"]

_GIB = 2**30


def plot(ladder: Ladder, path: Path) -> None:
    """Draw to a file."""
    title = f"Planned for {ladder.gpu}, not measured: what a GPU holds at its peak; line: its memory"
    _draw([partial(_panel, rows=rows, ladder=ladder) for rows in worlds(ladder.rows)], title, path)


def plot_measured(ladder: MeasuredLadder, path: Path) -> None:
    """Draw what was measured to a file."""
    title = (
        f"{ladder.kind.capitalize()} on {ladder.device.name}: a step's peak, rank 0 of a group without data"
    )
    _draw([partial(_measured_panel, rows=rows) for rows in worlds(ladder.rows)], title, path)


def _draw(panels: Sequence[Callable[["Axes"], None]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.6 * columns, 3.4 * rows + 1), layout="constrained", dpi=100)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, draw in zip(axes, panels, strict=False):
        draw(ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _measured_panel(axes: "Axes", rows: Sequence[MeasuredRow]) -> None:
    names = [row.rung for row in rows]
    held = [(row.allocated_bytes or 0) / _GIB for row in rows]
    planned = [row.planned_bytes / _GIB for row in rows]
    reserved = [(row.reserved_bytes or 0) / _GIB for row in rows]
    axes.barh(names, reserved, color="C7", alpha=0.3, label="reserved")
    axes.barh(names, held, color="C0", label="allocated")
    axes.plot(planned, names, "k|", markersize=12, label="planned")
    for place, row in enumerate(rows):
        text = "out of memory" if row.oom else f"{held[place]:.2f}"
        axes.text(
            max(held[place], reserved[place], planned[place]), place, f" {text}", va="center", fontsize=7
        )
    axes.set_xlim(0, max(held + planned + reserved) * 1.2)
    _label(axes, rows[0])


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
    _label(axes, rows[0])


def _label(axes: "Axes", row: Row | MeasuredRow) -> None:
    axes.invert_yaxis()
    axes.set_title(f"{WORKLOADS[row.workload].title}, rank 0 of {row.world}", fontsize=9)
    axes.set_xlabel("GiB", fontsize=8)
    axes.tick_params(labelsize=8)
