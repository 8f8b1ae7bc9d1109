"""SIGTERM and SIGINT ask a run to stop: it finishes the step, saves and exits as if it were done.

Slurm and Kubernetes send SIGTERM before they take a machine away, torchrun forwards it to its ranks, and
Ctrl-C is SIGINT. Whoever presses Ctrl-C again, a moment later, does not want to wait.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopSignals", "ignore_stop_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE_S = 2.0  # torchrun forwards what the terminal has sent already


class StopSignals:
    """Catches both signals while it is entered.

    Attributes:
        asked: name of the signal that came first, None before.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > _PATIENCE_S:
            raise KeyboardInterrupt


def ignore_stop_signals() -> None:
    """For a run's helper processes, which get the signals too and end with the run."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
