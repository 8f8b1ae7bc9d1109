"""The picture of a run: step time and gain against the rate, with fitted lines and break-evens."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.link.fit import Fit
from benchmarks.link.result import LinkRun, RateResult
from benchmarks.link.table import break_even_words
from benchmarks.link.workload import BASELINES, VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_UNLIMITED = 4.0  # times the highest rate: where unlimited is drawn


def plot(run: LinkRun, path: Path) -> None:
    """Draw step times (with their fits and break-evens) and gains; log axes but for gains."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    names = [name for name in VARIANTS if any(name in rate.variants for rate in run.rates)]
    figure = Figure(figsize=(12, 5.6), layout="constrained", dpi=130)
    times, gains = figure.subplots(1, 2)
    for name in names:
        _step_times(times, run, name, f"C{VARIANTS.index(name)}")
        _gains(gains, run.rates, name, f"C{VARIANTS.index(name)}")
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_minor_locator(NullLocator())
    times.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    times.set_ylabel("step, s")
    times.set_title(
        "step time: dots measured, with their range; lines fitted, bytes / rate + rest; stars: break-evens",
        fontsize=9,
    )
    gains.set_ylabel("times the baseline's speed")
    gains.axhline(1, color="black", linewidth=0.8)
    gains.set_title("gain over the faster of FSDP2 in bf16 and the preset bf16", fontsize=9)
    for axes in (times, gains):
        _rate_axis(axes, run.rates)
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    million = f"{run.parameters / 1e6:.0f} M parameters"
    figure.suptitle(f"{run.hosts} hosts, {million}, TCP between namespaces on {run.device.count} cores")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _place(rate: RateResult, rates: Sequence[RateResult]) -> float:
    """Where a rate stands on the axis, in Gbit/s."""
    if rate.asked_bits_per_s is not None:
        return fmean(rate.achieved_bits_per_s) / 1e9
    return _UNLIMITED * max((r.asked_bits_per_s or 0.0 for r in rates), default=0.0) / 1e9 or 1.0


def _step_times(axes: "Axes", run: LinkRun, name: str, color: str) -> None:
    measured = sorted((_place(r, run.rates), r) for r in run.rates if name in r.variants)
    places = [place for place, _ in measured]
    steps = [rate.variants[name].step_ms for _, rate in measured]
    values = [step.value / 1e3 for step in steps]
    below = [(s.value - min(s.samples)) / 1e3 for s in steps]
    above = [(max(s.samples) - s.value) / 1e3 for s in steps]
    known = name in BASELINES or name == "fsdp2-fp32"
    fit = run.fits.get(name)
    label = name if known or fit is None else f"{name}: {break_even_words(fit)}"
    axes.errorbar(places, values, [below, above], color=color, marker="o", markersize=4, linestyle=":",
                  linewidth=0.8, capsize=2, label=label)  # fmt: skip
    limited = [rate.asked_bits_per_s for rate in run.rates if rate.asked_bits_per_s is not None]
    if fit is not None and limited:
        _line(
            axes, fit, min(limited) / 1e9, max(limited) / 1e9 * _UNLIMITED / 2, color, "--" if known else "-"
        )


def _line(axes: "Axes", fit: Fit, first: float, last: float, color: str, dashes: str) -> None:
    """A fit from one rate in Gbit/s to another, with a star where the variant stops to pay."""
    grid = [first * (last / first) ** (i / 60) for i in range(61)]
    axes.plot(grid, [fit.seconds(x * 1e9) for x in grid], color=color, linewidth=1.4, linestyle=dashes)
    at = (fit.break_even_bits_per_s or 0.0) / 1e9
    if first <= at <= last:
        axes.plot([at], [fit.seconds(at * 1e9)], color=color, marker="*", markersize=13)


def _gains(axes: "Axes", rates: Sequence[RateResult], name: str, color: str) -> None:
    points = sorted((_place(rate, rates), 1.0 if v.gain is None else v.gain.value)
                    for rate in rates if (v := rate.variants.get(name)))  # fmt: skip
    axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.6)


def _rate_axis(axes: "Axes", rates: Sequence[RateResult]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    places = [_place(rate, rates) for rate in rates]
    words = ["unlimited" if r.asked_bits_per_s is None else f"{r.asked_bits_per_s / 1e9:g}" for r in rates]
    axes.set_xticks(places, words)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rate of each host, each way, Gbit/s")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
