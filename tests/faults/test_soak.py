"""A short soak: one fault of each kind, and a NaN, in 40 steps."""

from pathlib import Path

import pytest

from tests.faults.soak import KINDS, soak

pytestmark = pytest.mark.distributed


def test_a_run_that_meets_every_fault_ends_as_one_that_meets_none(tmp_path: Path) -> None:
    found = soak(tmp_path, steps=40, every=10, seed=0)
    assert sorted(fault.split("-")[0] for life in found.lives for fault in life.faults) == sorted(KINDS)
    assert (found.passed_over, found.lives[-1].ended, found.lives[-1].exit_status) == (1, 40, 0)
    assert found.compared > 0
