import math

import pytest

from benchmarks.stats import estimate


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)])
def test_interval_is_the_tabulated_order_statistics(n, k):
    # k from tables of the sign test's 95 % interval of the median
    assert estimate(range(n, 0, -1)) == (k, (n + 1) / 2, n + 1 - k)


@pytest.mark.parametrize("n", range(6, 60))
def test_interval_covers_95_percent_and_no_narrower_one_does(n):
    k = estimate(range(1, n + 1)).low
    coverage = [1 - 2 * sum(math.comb(n, i) for i in range(j)) / 2**n for j in (k, k + 1)]
    assert coverage[0] >= 0.95 > coverage[1]


def test_no_samples_no_median():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
