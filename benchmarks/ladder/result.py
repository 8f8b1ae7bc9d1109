"""The file of a ladder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.record import Origin, read_record

__all__ = ["SCHEMA_VERSION", "Ladder", "Row", "read"]

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


def read(path: Path) -> Ladder:
    """A file of this format."""
    return read_record(Ladder, path, SCHEMA_VERSION)
