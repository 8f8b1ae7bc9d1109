"""Step time as a function of the rate, and the rate at which a variant stops to pay.

    t(rate) = 8 · bytes / rate + rest          in seconds; rate in bits a second

Both numbers are fitted to the measured medians by least squares of relative errors; `unlimited` counts as an
infinite rate. What a step hides behind communication makes the true curve bend, so that the worst relative
error of the fit stands beside it. A variant pays where its line is below those of all baselines.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Fit", "break_even", "fit_line", "with_break_evens"]


@dataclass(frozen=True)
class Fit:
    """A variant's line."""

    bytes: float = field(metadata={"help": "fitted: what a step seems to wait for, to be held against sent"})
    rest_s: float = field(metadata={"help": "fitted: what a step takes at an infinite rate"})
    worst_error: float = field(metadata={"help": "largest relative distance of a measured median"})
    break_even_bits_per_s: float | None = field(
        default=None, metadata={"help": "pays below this rate; null: at every rate; 0: at none"}
    )

    def seconds(self, rate: float | None) -> float:
        """At a rate in bits a second; None: unlimited."""
        return self.rest_s + (0.0 if rate is None else 8 * self.bytes / rate)


def fit_line(times: Mapping[float | None, float]) -> Fit | None:
    """The line through seconds by rate; None where fewer than two rates were measured."""
    if len(times) < 2:
        return None
    # Rows (x / t, 1 / t) · (bytes, rest) = 1 in the normal equations.
    rows = [((0.0 if rate is None else 8 / rate) / t, 1 / t) for rate, t in times.items()]
    xx, xy, yy = (sum(a[i] * a[j] for a in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = sum(a[0] for a in rows), sum(a[1] for a in rows)
    determinant = xx * yy - xy * xy
    size, rest = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    worst = max(abs(size * a + rest * b - 1) for a, b in rows)
    return Fit(size, rest, worst)


def break_even(variant: Fit, baseline: Fit) -> float:
    """The rate below which the variant takes less time: 0 at none, infinite at every rate."""
    fewer_bytes, more_rest = baseline.bytes - variant.bytes, variant.rest_s - baseline.rest_s
    if fewer_bytes <= 0:
        return 0.0
    return math.inf if more_rest <= 0 else 8 * fewer_bytes / more_rest


def with_break_evens(fits: Mapping[str, Fit], baselines: tuple[str, ...]) -> dict[str, Fit]:
    """The fits with their break-evens, against the baselines that are there."""
    lines = [fits[name] for name in baselines if name in fits]

    def least(name: str, fit: Fit) -> Fit:
        if name in baselines or not lines:
            return fit
        rate = min(break_even(fit, line) for line in lines)
        return replace(fit, break_even_bits_per_s=None if math.isinf(rate) else rate)

    return {name: least(name, fit) for name, fit in fits.items()}
