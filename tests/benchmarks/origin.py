"""What made-up result files of the tests say of themselves."""

from typing import Any

from benchmarks.record import Device

__all__ = ["ORIGIN"]

ORIGIN: dict[str, Any] = {
    "device": Device("cpu", "A CPU", 2, 2**34),
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}
