"""A study as a table in plain text: what the preset costs in loss, against what the seed costs."""

from collections.abc import Iterator, Sequence

from benchmarks.accuracy.compare import faults
from benchmarks.accuracy.study import Comparison, Outcome, Study
from benchmarks.accuracy.variants import BASELINE

__all__ = ["table"]

_HEAD = f"{'loss':>9} {'gap':>10} {'worst pair':>10} {'gap/range':>9}  {'verdict':13}"


def table(study: Study) -> str:
    """Held-out losses of masters and of averages, bytes on the wire, checks; the answer last."""
    lines = []
    for weights, title in (("masters", "fp32 masters"), ("ema", "averages of the masters")):
        chosen = [c for c in study.comparisons if c.weights == weights]
        if chosen:
            lines += ["", *_part(study, chosen, title)]
    found = faults(study.outcomes)
    lines += ["", *(f"FAULT {fault}" for fault in found)]
    checks = "checks: ranks decode the same bits, second trainings repeat, all that should be is compressed"
    lines += [] if found else [checks]
    return "\n".join([*lines, _place(study)])


def _part(study: Study, chosen: Sequence[Comparison], title: str) -> Iterator[str]:
    first = chosen[0]
    spread = (
        f"range {first.baseline_range:.5f}, standard deviation {first.baseline_std:.5f}"
        if first.baseline_range is not None and first.baseline_std is not None
        else "one seed: no spread"
    )
    yield f"held-out loss of the {title}; seeds of {BASELINE!r}: {spread}"
    width = max(len(comparison.variant) for comparison in chosen)
    yield f"{'':{width}} {_HEAD} {'wire':>6} {'ms/step':>8}  seeds"
    for comparison in chosen:
        yield _line(comparison, study.outcomes[comparison.variant], width)


def _line(c: Comparison, outcome: Outcome, width: int) -> str:
    runs = outcome.runs
    losses = [run.loss if c.weights == "masters" else run.ema_loss for run in runs]
    seeds = " ".join("not finite" if x is None else f"{x:.5f}" for x in losses)
    share = f"{c.gap / c.baseline_range:+.2f}" if c.gap is not None and c.baseline_range else ""
    cells = [
        f"{c.variant:{width}}",
        f"{_number(c.mean, '.5f'):>9}",
        f"{_number(c.gap, '+.5f'):>10}",
        f"{_number(c.worst, '+.5f'):>10}",
        f"{share:>9}",
        f" {_verdict(c):13}",
        f"{sum(run.wire_ratio for run in runs) / len(runs):5.2f}x",
        f"{sum(run.step_ms for run in runs) / len(runs):8.1f}",
    ]
    return " ".join(cells) + f"  {seeds}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _verdict(c: Comparison) -> str:
    if c.variant == BASELINE:
        return ""
    if c.mean is None:
        return "NOT FINITE"
    if c.baseline_range is None:
        return "no spread"
    return "within std" if c.within_std else "within range" if c.within_range else "OUTSIDE"


def _place(study: Study) -> str:
    s = study.settings
    code = f"commit {study.commit[:10]}{' + changes' if study.dirty else ''}" if study.commit else "no commit"
    return (
        f"{study.parameters:,} parameters, {study.compressed:.1%} of them compressed; {s.steps} steps of "
        f"{s.batch} clips on {s.ranks} ranks; {study.device.name}, torch {study.versions['torch']}, {code}; "
        f"{study.seconds:.0f} s. gap: mean less that of {BASELINE!r}, over 0 is worse. wire: bytes of "
        f"FSDP2's fp32 collectives over ours."
    )
