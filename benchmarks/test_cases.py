"""`pytest benchmarks`: every case that fits this machine under pytest-benchmark, one group a case.

For ratios use `python -m benchmarks run`: it interleaves the contestants; pytest-benchmark runs them in turn.
"""

from typing import Any

import pytest

from benchmarks.case import Case, discover
from benchmarks.harness import check_gates

PAIRS = [(case, name) for case in discover().values() for name in case.contestants]


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("case", "contestant"), PAIRS, ids=[f"{case.name}-{name}" for case, name in PAIRS])
def test_case(benchmark: Any, case: Case, contestant: str) -> None:
    if not case.fits:
        pytest.skip(f"{case.name}: needs a {case.device} device")
    works = {name: case.contestants[name]() for name in dict.fromkeys((case.baseline, contestant))}
    red = [gate for gate in check_gates(case, works) if not gate.passed]
    assert not red, f"no timing behind a red gate: {red}"
    benchmark.group = case.name
    benchmark.pedantic(works[contestant], rounds=case.rounds, warmup_rounds=case.warmup)
