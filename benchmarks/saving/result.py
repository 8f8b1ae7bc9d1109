"""The result of a run over several worlds, its file, and how it follows from what ranks recorded.

Times are the slowest rank's. A gain is the median over rounds of plain's time over ours in the same round.
Where one byte was another after a load, there are no figures of that contestant, and no gains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.link.neighbours import Neighbours
from benchmarks.record import Measured, read_record
from benchmarks.result import GateResult, Measurement, Ratio
from benchmarks.saving.job import OURS, PLAIN, Workload
from benchmarks.saving.records import RankRecord
from benchmarks.stats import estimate

__all__ = ["SCHEMA_VERSION", "SavingRun", "WorldResult", "read_run", "world_result"]

SCHEMA_VERSION = 1

_TIMES = ("stall", "stall_cpu", "written", "load", "quiet", "beside", "lost")
_COMPARED = ("stall_ms", "stall_cpu_ms", "written_ms", "load_ms", "beside_ms", "disk_bytes")
_LIMITS = ("copy", "write", "hash")


@dataclass(frozen=True)
class WorldResult:
    """Both contestants at one world size."""

    ranks: int = field(metadata={"help": "processes that shared the state"})
    state_bytes: int = field(metadata={"help": "of the whole tensors, each once: the floor of disk_bytes"})
    rounds: int = field(metadata={"help": "measured; each ran both once, after one of warm-up"})
    others_cpu_share: float = field(
        metadata={"help": "of the machine's CPU time, what processes of others took meanwhile"}
    )
    gates: tuple[GateResult, ...] = field(
        metadata={"help": "bytes that a load brought back wrong, all rounds and ranks together"}
    )
    contestants: dict[str, dict[str, Measurement]] = field(
        metadata={
            "help": "contestant -> metric -> measurement, none behind a red gate; see benchmarks.saving"
        }
    )
    ratios: tuple[Ratio, ...] = field(metadata={"help": "gains of ours, if both gates are green"})
    steps_beside: dict[str, float] = field(
        metadata={"help": "median of the training steps that were begun during a save, by contestant"}
    )
    limits: dict[str, Measurement] = field(
        metadata={"help": "a copy, a synced file, its SHA-256: as many bytes by one plain call a rank, ms"}
    )

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def ratio(self, metric: str) -> Ratio | None:
        """Of ours over plain; None where none is given."""
        return next((ratio for ratio in self.ratios if ratio.metric == metric), None)


@dataclass(frozen=True, kw_only=True)
class SavingRun(Measured):
    """One run; all ranks share the device."""

    schema_version: int = field(metadata={"help": "version of this format"})
    workload: Workload = field(metadata={"help": "what was saved"})
    parameters: int = field(metadata={"help": "of the model; weights, two moments and an average of each"})
    filesystem: str = field(metadata={"help": "kind of the file system that was written to"})
    worlds: tuple[WorldResult, ...] = field(metadata={"help": "in the order of the run"})
    environment: dict[str, str] = field(metadata={"help": "what all ranks ran under"})
    load_average: float = field(metadata={"help": "processes that ran on this machine before the run"})
    seconds: float = field(metadata={"help": "how long the run took"})

    @property
    def passed(self) -> bool:
        return all(world.passed for world in self.worlds)


def world_result(ranks: Sequence[RankRecord], meanwhile: Neighbours) -> WorldResult:
    """What all ranks together say of one world size."""
    names = list(ranks[0].records)
    gates = tuple(_gate(name, ranks) for name in names)
    green = {gate.contestant for gate in gates if gate.passed}
    found = {name: _metrics(name, ranks) if name in green else {} for name in names}
    return WorldResult(
        ranks=len(ranks),
        state_bytes=ranks[0].state_bytes,
        rounds=len(ranks[0].records[names[0]].wrong_bytes),
        others_cpu_share=meanwhile.cpu_share,
        gates=gates,
        contestants=found,
        ratios=_ratios(found) if len(green) == len(names) else (),
        steps_beside={name: float(median(ranks[0].records[name].steps_beside)) for name in names},
        limits={name: _slowest([getattr(r.limits, f"{name}_s") for r in ranks]) for name in _LIMITS},
    )


def _gate(name: str, ranks: Sequence[RankRecord]) -> GateResult:
    wrong = sum(ranks[0].records[name].wrong_bytes)
    return GateResult("bytes that a load brings back wrong", name, wrong == 0, float(wrong), 0.0)


def _metrics(name: str, ranks: Sequence[RankRecord]) -> dict[str, Measurement]:
    records = [rank.records[name] for rank in ranks]
    times = {f"{time}_ms": _slowest([getattr(r, f"{time}_s") for r in records]) for time in _TIMES}
    return times | {"disk_bytes": _measured([float(b) for b in records[0].disk_bytes], "bytes")}


def _slowest(samples_s: Sequence[Sequence[float]]) -> Measurement:
    """Of the ranks' samples in seconds: each round's longest, in ms."""
    return _measured([1e3 * max(times) for times in zip(*samples_s, strict=True)], "ms")


def _measured(samples: Sequence[float], unit: str) -> Measurement:
    low, value, high = estimate(samples)
    return Measurement(value, low, high, unit, "lower", tuple(samples))


def _ratios(found: dict[str, dict[str, Measurement]]) -> tuple[Ratio, ...]:
    pairs = ((name, found[PLAIN][name].samples, found[OURS][name].samples) for name in _COMPARED)
    return tuple(_ratio(name, plain, ours) for name, plain, ours in pairs)


def _ratio(metric: str, plain: Sequence[float], ours: Sequence[float]) -> Ratio:
    low, value, high = estimate([p / o for p, o in zip(plain, ours, strict=True)])
    return Ratio(OURS, metric, value, low, high)


def read_run(path: Path) -> SavingRun:
    """Read and check a run.

    Raises:
        ValueError: not a file of this format; names the file and the first fault.
    """
    return read_record(SavingRun, path, SCHEMA_VERSION)
