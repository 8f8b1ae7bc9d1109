"""The loss curve of a run, from its metrics.jsonl.

The smooth line is an exponential moving average with bias correction (Kingma & Ba, arXiv 1412.6980, section
3), so that it starts at the first loss instead of at zero.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from dtrain.metrics.records import read_records

_DECADE = 10.0  # a wider range than this is drawn on a logarithmic axis


def loss_curve(metrics: Path, picture: Path) -> Path:
    """Draw the loss over the steps, raw and smoothed, into a PNG.

    Args:
        metrics: a run's metrics.jsonl. Losses that are not finite leave gaps.
        picture: where the PNG goes.
    """
    points = [(r["step"], float(r["loss"])) for r in read_records(metrics) if "loss" in r]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not points:
        raise ValueError(f"{metrics}: no record with a finite loss; the curve needs at least one")
    steps, losses = zip(*points, strict=True)
    _draw(steps, losses, picture)
    return picture


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Bias-corrected exponential moving average whose weights fall by e over `span` values."""
    keep = math.exp(-1 / span)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def _draw(steps: Sequence[int], losses: Sequence[float], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    smoothed = smooth(losses, span=max(1.0, len(losses) / 30))
    axes.plot(
        steps, losses, color="#9ecae1", linewidth=0.8, marker="." if len(steps) == 1 else "", label="loss"
    )
    axes.plot(steps, smoothed, color="#08519c", linewidth=1.8, label="smoothed")
    axes.annotate(f"{smoothed[-1]:.4g}", (steps[-1], smoothed[-1]), (4, 0), textcoords="offset points")
    if min(losses) > 0 and max(losses) / min(losses) > _DECADE:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(picture))
