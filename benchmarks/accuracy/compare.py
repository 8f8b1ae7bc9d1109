"""Is a preset's loss within what the seed alone does to it?

With L(v, s) the final held-out loss of variant v and seed s, and only seeds that both have:

    gap(v) = mean_s L(v, s) - mean_s L(none, s)        worst(v) = the L(v, s) - L(none, s) of largest size

The gap is held against max - min and the standard deviation (of a sample) of L(none, s).
"""

from collections.abc import Iterator, Mapping
from statistics import fmean, stdev

from benchmarks.accuracy.study import Comparison, Outcome, Run
from benchmarks.accuracy.variants import BASELINE

__all__ = ["compare", "faults"]


def compare(outcomes: Mapping[str, Outcome]) -> tuple[Comparison, ...]:
    """Every variant with the baseline, on masters and on averages; nothing without a baseline."""
    if BASELINE not in outcomes or not outcomes[BASELINE].runs:
        return ()
    return tuple(_comparisons(outcomes))


def _comparisons(outcomes: Mapping[str, Outcome]) -> Iterator[Comparison]:
    for weights in ("masters", "ema"):
        baseline = _losses(outcomes[BASELINE].runs, weights)
        for name, outcome in outcomes.items():
            if outcome.runs:
                yield _comparison(name, weights, _losses(outcome.runs, weights), baseline)


def _losses(runs: tuple[Run, ...], weights: str) -> dict[int, float | None]:
    return {run.seed: run.loss if weights == "masters" else run.ema_loss for run in runs}


def _comparison(
    name: str, weights: str, mine: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> Comparison:
    theirs = [loss for loss in baseline.values() if loss is not None]
    spread = max(theirs) - min(theirs) if len(theirs) > 1 else None
    std = stdev(theirs) if len(theirs) > 1 else None
    pairs = [(mine[seed], baseline.get(seed)) for seed in mine if seed in baseline]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not whole or len(whole) < len(pairs):  # a loss that is not finite is outside of every range
        return Comparison(name, weights, None, None, None, spread, std, False, False)
    differences = [a - b for a, b in whole]
    gap = fmean(differences)
    return Comparison(
        variant=name,
        weights=weights,
        mean=fmean(a for a, _ in whole),
        gap=gap,
        worst=max(differences, key=abs),
        baseline_range=spread,
        baseline_std=std,
        within_range=spread is not None and abs(gap) <= spread,
        within_std=std is not None and abs(gap) <= std,
    )


def faults(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What went wrong, a line each; empty where all seeds ended and all checks held."""
    found = []
    for name, outcome in outcomes.items():
        found += [f"{name}: {outcome.fault}"] if outcome.fault else []
        for run in outcome.runs:
            found += [f"{name}, seed {run.seed}: {fault}" for fault in _faults(run, outcome)]
    return found


def _faults(run: Run, outcome: Outcome) -> Iterator[str]:
    if not run.replicas_equal:
        yield "ranks decode different weights"
    if run.repeats is False:
        yield "a second training gave other bits"
    if run.uncompressed:
        yield f"{run.uncompressed} collectives were not compressed"
    if run.non_finite:
        yield f"{run.non_finite} blocks on the wire were not finite"
    plain = outcome.comm["preset"] == BASELINE
    if plain != (run.weight_error == 0):
        preset = outcome.comm["preset"]
        yield f"decoded weights are {run.weight_error:.1e} from the masters, with preset {preset}"
