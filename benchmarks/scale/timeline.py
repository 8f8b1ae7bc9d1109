"""Spans of time on the streams of a device, and how much of some lies beside others.

On a GPU a span is a pair of events, recorded on whichever stream is current: it begins when the stream gets
there, and not when the host does. On a CPU, which does one thing at a time, it is wall clock.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

__all__ = ["Span", "Timeline", "beside", "total", "union"]

Stamp: TypeAlias = torch.cuda.Event | float
Span: TypeAlias = tuple[float, float]


class Timeline:
    """Spans by lane, in ms after the timeline began.

    Args:
        kind: of device, "cuda" or "cpu".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._stamps: dict[str, list[tuple[Stamp, Stamp]]] = defaultdict(list)
        self._open: dict[str, Stamp] = {}
        self._begun = self._stamp()

    def begin(self, lane: str) -> None:
        """A span of the lane begins on the current stream; spans of one lane do not nest."""
        assert lane not in self._open, f"{lane} is under way"
        self._open[lane] = self._stamp()

    def end(self, lane: str) -> None:
        """The span that began ends."""
        self._stamps[lane].append((self._open.pop(lane), self._stamp()))

    @contextmanager
    def span(self, lane: str) -> Iterator[None]:
        self.begin(lane)
        yield
        self.end(lane)

    def spans(self) -> dict[str, list[Span]]:
        """All of them; waits for the device."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return {
            lane: [(self._ms(a), self._ms(b)) for a, b in stamps] for lane, stamps in self._stamps.items()
        }

    def _stamp(self) -> Stamp:
        if self.kind == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, stamp: Stamp) -> float:
        begun = self._begun
        if isinstance(stamp, float) or isinstance(begun, float):
            assert isinstance(stamp, float)
            assert isinstance(begun, float)
            return 1e3 * (stamp - begun)
        return float(begun.elapsed_time(stamp))


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def total(spans: Iterable[Span]) -> float:
    """How long at least one of them lasts."""
    return sum(end - begin for begin, end in union(spans))


def beside(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """How long one of `spans` and one of `others` last at the same time."""
    mine, theirs = union(spans), union(others)
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in mine for c, d in theirs)
