"""Two results of one case, side by side: what changed, and is the change more than noise?

Two runs share no rounds, so their samples cannot be paired: a change counts only where the two 95 % intervals
do not overlap, which is a stricter test than 95 %.
"""

from dataclasses import dataclass

from benchmarks.result import Measurement, Result


@dataclass(frozen=True)
class Change:
    """One metric of one contestant before (a) and after (b)."""

    contestant: str
    metric: str
    a: Measurement
    b: Measurement

    @property
    def ratio(self) -> float | None:
        """b / a; None where a is 0."""
        return self.b.value / self.a.value if self.a.value else None

    @property
    def verdict(self) -> str:
        if self.a.low <= self.b.high and self.b.low <= self.a.high:
            return "the same" if self.a.value == self.b.value else "within the spread"
        return "better" if (self.b.value < self.a.value) == (self.b.better == "lower") else "worse"


def changes(a: Result, b: Result) -> list[Change]:
    """Every metric that both results have.

    Raises:
        ValueError: the results are of different cases.
    """
    if a.case != b.case:
        raise ValueError(f"case = {a.case!r} and {b.case!r}: only two results of one case can be compared")
    return [
        Change(name, metric, measurement, b.contestants[name][metric])
        for name, metrics in a.contestants.items()
        for metric, measurement in metrics.items()
        if metric in b.contestants.get(name, {})
    ]


def differences(a: Result, b: Result) -> list[str]:
    """What else differs between the two runs, and so may be the cause of a change."""
    found = [f"gates of {label}: red" for label, result in (("A", a), ("B", b)) if not result.passed]
    pairs = {"title": (a.title, b.title), "device": (a.device, b.device), "threads": (a.threads, b.threads)}
    pairs |= {
        name: (a.versions.get(name), b.versions.get(name)) for name in a.versions.keys() | b.versions.keys()
    }
    found += [f"{name}: {x} and {y}" for name, (x, y) in sorted(pairs.items()) if x != y]
    for name in a.contestants.keys() ^ b.contestants.keys():
        found.append(f"contestant {name}: only in {'A' if name in a.contestants else 'B'}")
    return found
