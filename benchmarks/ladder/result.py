"""The files of a ladder: planned and measured."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.record import Measured, Origin, read_record

__all__ = [
    "SCHEMA_VERSION",
    "Gate",
    "Ladder",
    "MeasuredLadder",
    "MeasuredRow",
    "Missing",
    "Row",
    "read",
    "read_measured",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One rung of a workload on so many GPUs: what its rank 0 holds in a step."""

    workload: str = field(metadata={"help": "by its name in benchmarks.ladder.workloads"})
    rung: str = field(metadata={"help": "by its name in benchmarks.ladder.rungs"})
    world: int = field(metadata={"help": "GPUs"})
    peak_bytes: int = field(metadata={"help": "that a GPU holds at once: state, activations and buffers"})
    kinds: dict[str, int] = field(metadata={"help": "of them by kind"})
    when: str = field(metadata={"help": "what runs at the peak"})
    host_bytes: int = field(metadata={"help": "in the host's memory, a GPU"})
    flops: int = field(metadata={"help": "of a GPU's step, what is computed again included"})
    wire_bytes: int = field(metadata={"help": "that a GPU sends in a step"})
    step_s: float = field(metadata={"help": "estimated, at assumed rates; not measured"})


@dataclass(frozen=True, kw_only=True)
class Ladder(Origin):
    """All rows, planned."""

    kind: Literal["planned"] = field(metadata={"help": "on tensors without data, not measured"})
    schema_version: int = field(metadata={"help": "version of this format"})
    gpu: str = field(metadata={"help": "that was planned for"})
    memory_bytes: int = field(metadata={"help": "of it"})
    assumed: str = field(metadata={"help": "rates of the estimated times"})
    rows: tuple[Row, ...] = field(metadata={"help": "by workload, world and rung"})


@dataclass(frozen=True)
class Gate:
    """A rung at a tiny size, held against plain PyTorch in fp32."""

    workload: str = field(metadata={"help": "by its name in benchmarks.ladder.workloads"})
    rung: str = field(metadata={"help": "by its name in benchmarks.ladder.rungs"})
    loss_error: float = field(metadata={"help": "|loss - exact| / |exact|"})
    gradient_error: float = field(metadata={"help": "the same of all gradients as one vector"})
    limit: float = field(metadata={"help": "of both"})
    passed: bool = field(metadata={"help": "else the workload has no times"})


@dataclass(frozen=True)
class MeasuredRow:
    """One rung of a workload: what rank 0 of so many GPUs held and how long its step took."""

    workload: str = field(metadata={"help": "by its name in benchmarks.ladder.workloads"})
    rung: str = field(metadata={"help": "by its name in benchmarks.ladder.rungs"})
    world: int = field(metadata={"help": "GPUs"})
    planned_bytes: int = field(metadata={"help": "peak that the planner says"})
    host_bytes: int = field(metadata={"help": "in the host's memory, planned"})
    allocated_bytes: int | None = field(
        metadata={"help": "most that tensors took at once, behind one step to warm up; null: out of memory"}
    )
    reserved_bytes: int | None = field(
        metadata={"help": "most that PyTorch's allocator took from the GPU; null on a CPU"}
    )
    steps_s: tuple[float, ...] = field(
        metadata={"help": "seconds of whole steps, without communication; none behind a red gate"}
    )
    oom: str = field(metadata={"help": "what it asked for as the memory ran out; empty if it did not"})

    @property
    def step_s(self) -> float | None:
        """Median of the steps."""
        return median(self.steps_s) if self.steps_s else None


@dataclass(frozen=True)
class Missing:
    """A rung without a row."""

    workload: str = field(metadata={"help": "by its name in benchmarks.ladder.workloads"})
    rung: str = field(metadata={"help": "by its name in benchmarks.ladder.rungs; empty: all of them"})
    world: int = field(metadata={"help": "GPUs"})
    reason: str = field(metadata={"help": "why"})
    failed: bool = field(metadata={"help": "a fault, or else a lack of time"})


@dataclass(frozen=True, kw_only=True)
class MeasuredLadder(Measured):
    """What was measured on one device: rank 0 of a process group of the world's size that moves no data."""

    kind: Literal["measured", "rehearsal"] = field(metadata={"help": "rehearsal: tiny models on a CPU"})
    schema_version: int = field(metadata={"help": "version of this format"})
    rows: tuple[MeasuredRow, ...] = field(metadata={"help": "by workload, world and rung"})
    gates: tuple[Gate, ...] = field(metadata={"help": "of each workload"})
    missing: tuple[Missing, ...] = field(metadata={"help": "what was not measured"})

    @property
    def sound(self) -> bool:
        """Whether all gates are green and nothing failed."""
        return all(gate.passed for gate in self.gates) and not any(one.failed for one in self.missing)


def read(path: Path) -> Ladder:
    """A file of this format."""
    return read_record(Ladder, path, SCHEMA_VERSION)


def read_measured(path: Path) -> MeasuredLadder:
    """A file of what was measured."""
    return read_record(MeasuredLadder, path, SCHEMA_VERSION)
