"""The picture of a modelled run: the gain against the number of GPUs, for each rate."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scale.result import ScaleModel
from benchmarks.scale.table import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]


def plot(model: ScaleModel, path: Path) -> None:
    """Draw one panel a rate; two levels are solid, one level is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = sorted({p.gbit for p in model.points})
    columns = min(2, len(rates))
    rows = -(-len(rates) // columns)
    figure = Figure(figsize=(6 * columns, 3.6 * rows + 1), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, gbit in zip(panels, rates, strict=False):
        _panel(axes, model, gbit)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    title = f"MODEL, not a measurement: gain over {model.baseline}; dashed: sums in one level"
    figure.suptitle(f"{title}\n{model.assumptions[0]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: "Axes", model: ScaleModel, gbit: float) -> None:
    found = [p for p in model.points if p.gbit == gbit]
    names = list(dict.fromkeys(p.variant for p in found))
    for line in dict.fromkeys(label(p) for p in found):
        row = sorted((p.gpus, p) for p in found if label(p) == line)
        first = row[0][1]
        axes.plot(
            [n for n, _ in row],
            [p.gain for _, p in row],
            color=f"C{names.index(first.variant)}",
            linestyle="--" if first.levels == 1 else "-",
            marker="o",
            markersize=3,
            label=line,
        )
    gpus = sorted({p.gpus for p in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(n) for n in gpus])
    axes.set_title(f"{gbit:g} Gbit/s a GPU (model)", fontsize=9)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times the baseline's speed")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
