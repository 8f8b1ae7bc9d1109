"""Injects every fault into real runs and writes what came of it, for docs/reliability.md.

    python -m tests.faults.table --json benchmarks/results/faults/faults.json
    python -m benchmarks report

It runs the tests of this folder that tell of a fault; where one fails, nothing is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.environment import measured_on
from benchmarks.faults import FaultRuns, Met
from benchmarks.record import write_record

__all__ = ["main"]


class _Collected:
    """A pytest plugin that keeps what the fixture `told` recorded."""

    def __init__(self) -> None:
        self.met: list[Met] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.met += [Met(**told) for name, told in report.user_properties if name == "fault"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; pytest's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    arguments = parser.parse_args(argv)
    origin = measured_on("cpu", "tests.faults.table", sys.argv[1:] if argv is None else argv)
    collected = _Collected()
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("ranks", "updates", "hosts")]
    status = pytest.main(["-v", *files], plugins=[collected])
    if status == pytest.ExitCode.OK:
        write_record(FaultRuns(**origin, met=tuple(collected.met)), arguments.json)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
