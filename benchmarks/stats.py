"""How sure a median is, with no assumption about the distribution of the samples.

For n independent samples in ascending order, the median of what they were drawn from lies in
[x_k, x_(n+1-k)] with probability 1 - 2·P(Binomial(n, 1/2) < k): sign-test inversion, as in W. J. Conover,
Practical Nonparametric Statistics (1999), 3.2. It needs no random numbers, so it repeats exactly.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A median and the interval that holds the true one with probability >= 95 % (from 6 samples on)."""

    low: float
    value: float
    high: float


def estimate(samples: Sequence[float]) -> Estimate:
    """Median and interval; fewer than 6 samples cannot reach 95 %, their interval is the whole range."""
    if not samples:
        raise ValueError("samples = []: a median needs at least one")
    ordered = sorted(samples)
    k = _rank(len(ordered))
    return Estimate(ordered[k - 1], median(ordered), ordered[-k])


def _rank(n: int) -> int:
    """The largest k >= 1 whose interval [x_k, x_(n+1-k)] still has the wanted coverage."""
    k, tail = 0, 0.0
    while k < n:
        tail += math.comb(n, k) / 2**n  # P(Binomial(n, 1/2) <= k)
        if 1 - 2 * tail < CONFIDENCE:
            break
        k += 1
    return max(k, 1)
