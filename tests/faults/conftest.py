"""What tests of faults share."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import Met
from tests.faults.runs import Run, Tell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs of a module."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    """A run that meets no fault."""
    run = Run(folder, "undisturbed")
    run.train()
    assert run.steps == [12, 16, 20]
    return run


@pytest.fixture
def told(record_property: Callable[[str, Any], None]) -> Tell:
    """Tell a fault and what came of it, for the table of docs/reliability.md; see `tests.faults.table`."""

    def tell(
        fault: str,
        outcome: str,
        *,
        steps_lost: int | None = None,
        seconds: float | None = None,
        same_weights: bool | None = None,
    ) -> None:
        record_property("fault", asdict(Met(fault, outcome, steps_lost, seconds, same_weights)))

    return tell
