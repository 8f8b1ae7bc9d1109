"""The picture of a study: losses along the way, and final losses beside the spread of the baseline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.study import Outcome, Run, Study
from benchmarks.accuracy.variants import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]


def plot(study: Study, path: Path) -> None:
    """Draw to a file. Ablations are dashed; the band is the range of the baseline's seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    outcomes = {name: o for name, o in study.outcomes.items() if o.runs}
    colours = {name: f"C{i}" if name != BASELINE else "black" for i, name in enumerate(outcomes, start=-1)}
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    _curves(axes[0, 0], outcomes, colours)
    _gaps(axes[0, 1], outcomes, colours)
    _finals(axes[1, 0], outcomes, colours, "masters")
    _finals(axes[1, 1], outcomes, colours, "ema")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(axis: "Axes", outcomes: Mapping[str, Outcome], colours: Mapping[str, str]) -> None:
    """Held-out losses, means of the seeds; training losses fainter."""
    for name, outcome in outcomes.items():
        style: dict[str, Any] = {"color": colours[name], "linestyle": "--" if outcome.ablation else "-"}
        training = [run.training for run in outcome.runs]
        axis.plot(training[0].steps, _means([c.losses for c in training]), **style, alpha=0.25, linewidth=0.7)
        curves = [run.held_out for run in outcome.runs]
        axis.plot(curves[0].steps, _means([c.losses for c in curves]), **style, label=name, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_title("held-out loss (faint: training loss), mean of seeds", fontsize=9)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3, which="both")


def _gaps(axis: "Axes", outcomes: Mapping[str, Outcome], colours: Mapping[str, str]) -> None:
    """What the curves hide: their distance from the baseline's, in percent of it."""
    if BASELINE not in outcomes:
        return
    runs = outcomes[BASELINE].runs
    seeds = [run.held_out.losses for run in runs]
    baseline, steps = _means(seeds), runs[0].held_out.steps
    low = [100 * (min(_finite(x)) / b - 1) for x, b in zip(zip(*seeds, strict=True), baseline, strict=True)]
    high = [100 * (max(_finite(x)) / b - 1) for x, b in zip(zip(*seeds, strict=True), baseline, strict=True)]
    axis.fill_between(steps, low, high, color="black", alpha=0.15, linewidth=0)
    for name, outcome in outcomes.items():
        means = _means([run.held_out.losses for run in outcome.runs])
        gaps = [100 * (mean / b - 1) for mean, b in zip(means, baseline, strict=True)]
        axis.plot(
            steps, gaps, color=colours[name], linestyle="--" if outcome.ablation else "-", linewidth=1.2
        )
    axis.set_title(f"held-out loss less that of {BASELINE!r}, % (band: its seeds)", fontsize=9)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def _finals(axis: "Axes", outcomes: Mapping[str, Outcome], colours: Mapping[str, str], weights: str) -> None:
    """A dot for each seed, a bar at their mean."""
    for i, (name, outcome) in enumerate(outcomes.items()):
        losses = _finite([_loss(run, weights) for run in outcome.runs])
        axis.plot(losses, [i] * len(losses), "o", color=colours[name], markersize=4)
        if losses:
            axis.plot([fmean(losses)] * 2, [i - 0.35, i + 0.35], color=colours[name], linewidth=2)
        if name == BASELINE and losses:
            axis.axvspan(min(losses), max(losses), color="black", alpha=0.12, linewidth=0)
    axis.set_yticks(range(len(outcomes)), list(outcomes), fontsize=8)
    axis.invert_yaxis()
    title = "fp32 masters" if weights == "masters" else "averages"
    axis.set_title(f"final held-out loss, {title} (band: {BASELINE!r})", fontsize=9)
    axis.grid(axis="x", alpha=0.3)


def _loss(run: Run, weights: str) -> float | None:
    return run.loss if weights == "masters" else run.ema_loss


def _finite(losses: Sequence[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]


def _means(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """Of the seeds that are finite at a point; NaN, which leaves a hole in the line, where none is."""
    return [fmean(_finite(at)) if _finite(at) else float("nan") for at in zip(*curves, strict=True)]
