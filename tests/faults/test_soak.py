"""A short soak: a rank is killed, the run is told to stop, and a loss is NaN, in 24 steps."""

from pathlib import Path

import pytest

from tests.faults.soak import soak

pytestmark = pytest.mark.distributed


def test_a_run_that_meets_faults_ends_as_one_that_meets_none(tmp_path: Path) -> None:
    found = soak(tmp_path, steps=24, every=12, seed=0)
    assert sorted(fault.split("-")[0] for life in found.lives for fault in life.faults) == ["kill", "term"]
    assert (found.passed_over, found.lives[-1].ended, found.lives[-1].exit_status) == (1, 24, 0)
    assert found.compared > 0
