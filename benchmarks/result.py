"""The result of one run of one case, and its file.

These dataclasses are the format; `schema.json` is written from them (`python -m benchmarks schema`). A change
that an old reader would misread raises SCHEMA_VERSION.
"""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.case import Better
from benchmarks.record import Measured, read_record

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """One metric of one contestant."""

    value: float = field(metadata={"help": "median of the samples"})
    low: float = field(metadata={"help": "lower end of the median's 95 % interval"})
    high: float = field(metadata={"help": "upper end of the median's 95 % interval"})
    unit: str = field(metadata={"help": "unit of all numbers here"})
    better: Better = field(metadata={"help": "which direction is an improvement"})
    samples: tuple[float, ...] = field(metadata={"help": "one a round, in order; just one if counted"})


@dataclass(frozen=True)
class Ratio:
    """A contestant's gain over the baseline in one metric, from rounds in which both ran side by side."""

    contestant: str = field(metadata={"help": "who is compared with the baseline"})
    metric: str = field(metadata={"help": "in which metric"})
    value: float = field(metadata={"help": "median of the rounds' gains; over 1 is better in any metric"})
    low: float = field(metadata={"help": "lower end of the median's 95 % interval"})
    high: float = field(metadata={"help": "upper end of the median's 95 % interval"})


@dataclass(frozen=True)
class GateResult:
    """A correctness check of one contestant against the baseline. One red gate: no ratios for it."""

    name: str = field(metadata={"help": "what was checked"})
    contestant: str = field(metadata={"help": "who was checked"})
    passed: bool = field(metadata={"help": "error <= limit"})
    error: float | None = field(metadata={"help": "what was measured; null if it is not a finite number"})
    limit: float = field(metadata={"help": "largest error that passes"})


@dataclass(frozen=True)
class Floor:
    """What the work must cost, and the time that this implies at rates measured just before."""

    flops: int = field(metadata={"help": "floating-point operations that any implementation must do"})
    bytes: int = field(
        metadata={"help": "bytes that any implementation must move through the device's memory"}
    )
    reason: str = field(metadata={"help": "what was counted"})
    flops_per_s: float = field(metadata={"help": "fastest matrix product seen, in the case's dtype"})
    bytes_per_s: float = field(metadata={"help": "fastest large copy seen, bytes read plus bytes written"})
    floor_ms: float = field(metadata={"help": "max(flops / flops_per_s, bytes / bytes_per_s), in ms"})


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """One run of one case."""

    schema_version: int = field(metadata={"help": "version of this format"})
    case: str = field(metadata={"help": "name of the case"})
    title: str = field(metadata={"help": "what the case compares, for people"})
    baseline: str = field(metadata={"help": "contestant that the ratios refer to"})
    contestants: dict[str, dict[str, Measurement]] = field(
        metadata={"help": "contestant -> metric -> measurement"}
    )
    ratios: tuple[Ratio, ...] = field(metadata={"help": "gains over the baseline, behind green gates only"})
    gates: tuple[GateResult, ...] = field(metadata={"help": "correctness checks, made before the timing"})
    floor: Floor = field(metadata={"help": "lower bound of the time"})
    threads: int = field(metadata={"help": "CPU threads that PyTorch used inside an operator"})
    cpu_share: float = field(metadata={"help": "CPU time / (wall time × threads) during the timing"})
    rounds: int = field(metadata={"help": "timed rounds; each runs every contestant once"})
    warmup: int = field(metadata={"help": "untimed rounds before them"})

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


def read(path: Path) -> Result:
    """Read and validate a result file.

    Raises:
        ValueError: not a result file of this format; names the file and the first fault.
    """
    return read_record(Result, path, SCHEMA_VERSION)


def latest(folder: Path = RESULTS) -> list[Result]:
    """The newest result of each case in a folder, by case name."""
    newest: dict[str, Result] = {}
    for result in sorted(map(read, folder.glob("*.json")), key=lambda r: r.date):
        newest[result.case] = result
    return [newest[name] for name in sorted(newest)]
