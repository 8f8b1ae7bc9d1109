"""The picture of a step: bytes by kind from the first allocation to the last."""

from pathlib import Path

import numpy as np

from dtrain.plan.accounts import HOST
from dtrain.plan.peak import KINDS, kind_of
from dtrain.plan.plan import Plan

__all__ = ["draw_timeline"]

_POINTS = 2000
_COLOURS = (
    "#4c566a", "#5e81ac", "#81a1c1", "#88c0d0", "#a3be8c",
    "#ebcb8b", "#d08770", "#bf616a", "#b48ead", "#a9705a", "#cccccc",
)  # fmt: skip


def draw_timeline(plan: Plan, path: Path) -> Path:
    """Draw to a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = _levels(plan) / 2**30
    shown = [i for i in range(len(KINDS)) if levels[i].max() > 0]
    x = np.arange(levels.shape[1])
    keep = _kept(levels.sum(axis=0))
    figure, axis = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    axis.stackplot(
        x[keep],
        [levels[i][keep] for i in shown],
        labels=[KINDS[i] for i in shown],
        colors=[_COLOURS[i] for i in shown],
        linewidth=0,
    )
    axis.axhline(plan.room / 2**30, color="black", linewidth=1, linestyle="--")
    axis.plot(plan.peak.event, plan.peak.nbytes / 2**30, "v", color="black")
    axis.annotate(
        f"{plan.peak.nbytes / 2**30:.2f} GiB, {plan.peak.when}",
        (plan.peak.event, plan.peak.nbytes / 2**30),
        textcoords="offset points",
        xytext=(6, 6),
        fontsize=8,
    )
    for mark in plan.simulation.marks:
        if mark.name in ("forward", "backward", "update"):
            axis.axvline(mark.event, color="black", linewidth=0.5)
            axis.text(mark.event, 0, f" {mark.name}", fontsize=8, va="bottom", color="white")
    axis.set_ylim(0, max(1.1 * plan.peak.nbytes, min(1.05 * plan.room, 1.6 * plan.peak.nbytes)) / 2**30)
    axis.set_xlim(0, levels.shape[1])
    axis.set_xlabel("allocations and releases of a step, in order")
    axis.set_ylabel("GiB on a GPU")
    axis.set_title(
        f"{plan.config.name}: rank 0 of {plan.gpus} on {plan.gpu.name} (dashed: room)", fontsize=10
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, reverse=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _levels(plan: Plan) -> np.ndarray:
    """(kinds, events + 1) bytes."""
    rows = [*KINDS, HOST]
    kinds = [rows.index(kind_of(account)) for account in plan.simulation.accounts]
    deltas = np.zeros((len(rows), len(plan.simulation.events) + 1), dtype=np.int64)
    for kind, nbytes in zip(kinds, plan.simulation.start, strict=True):
        deltas[kind, 0] += nbytes
    for i, (delta, account) in enumerate(plan.simulation.events, start=1):
        deltas[kinds[account], i] += delta
    return deltas.cumsum(axis=1)[: len(KINDS)]


def _kept(total: np.ndarray) -> np.ndarray:
    """Of every stretch of events the lowest and the highest: peaks stay where many events share a pixel."""
    stretches = np.array_split(np.arange(len(total)), min(_POINTS, len(total)))
    return np.unique([i for s in stretches for i in (s[total[s].argmin()], s[total[s].argmax()])])
