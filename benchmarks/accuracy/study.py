"""The result of a study, and its file.

These dataclasses are the format (`benchmarks.schema.decode` reads it strictly). A loss that is not a finite
number is null.
"""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accuracy.settings import Settings
from benchmarks.record import Measured, read_record

__all__ = ["SCHEMA_VERSION", "Comparison", "Curve", "Outcome", "Run", "Study", "read"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Curve:
    """Losses along a training."""

    steps: tuple[int, ...] = field(metadata={"help": "steps done"})
    losses: tuple[float | None, ...] = field(metadata={"help": "one for each of them"})


@dataclass(frozen=True)
class Run:
    """One training."""

    seed: int = field(metadata={"help": "of weights, order, times and noises"})
    loss: float | None = field(metadata={"help": "held-out, at the end, of the fp32 masters"})
    ema_loss: float | None = field(metadata={"help": "held-out, at the end, of the averaged masters"})
    training: Curve = field(metadata={"help": "training loss, means since the point before"})
    held_out: Curve = field(metadata={"help": "held-out loss of the masters on a part of the set"})
    replicas_equal: bool = field(
        metadata={"help": "all ranks decode the same weights at the end, bit for bit"}
    )
    repeats: bool | None = field(
        metadata={"help": "a second training's first losses have the same bits; null: not tried"}
    )
    weight_error: float = field(metadata={"help": "|decoded - masters| / |masters| at the end"})
    wire_mib: float = field(metadata={"help": "MiB that a rank sends a step; 0 where FSDP2 sends itself"})
    wire_ratio: float = field(metadata={"help": "bytes of FSDP2's own fp32 collectives over these"})
    uncompressed: int = field(metadata={"help": "collectives that should have been compressed and were not"})
    non_finite: int = field(metadata={"help": "blocks on the wire that held NaN or infinity"})
    step_ms: float = field(metadata={"help": "mean time of a step, on whatever else the machine did"})


@dataclass(frozen=True)
class Outcome:
    """A variant's trainings."""

    ablation: bool = field(metadata={"help": "a preset without a part of it"})
    comm: dict[str, str] = field(
        metadata={"help": "its CommConfig, as text, and fields of other tables that it changes"}
    )
    runs: tuple[Run, ...] = field(metadata={"help": "one for each seed that ended"})
    fault: str = field(metadata={"help": "why seeds are missing; empty where none is"})


@dataclass(frozen=True)
class Comparison:
    """A variant's final losses beside the baseline's of the same seeds."""

    variant: str = field(metadata={"help": "who is compared"})
    weights: str = field(metadata={"help": "masters or ema"})
    mean: float | None = field(metadata={"help": "of the seeds' losses"})
    gap: float | None = field(metadata={"help": "its distance from the baseline's mean; over 0 is worse"})
    worst: float | None = field(metadata={"help": "the seed's difference that is largest in size"})
    baseline_range: float | None = field(metadata={"help": "baseline's largest loss less its smallest"})
    baseline_std: float | None = field(metadata={"help": "standard deviation of the baseline's losses"})
    within_range: bool = field(metadata={"help": "|gap| <= baseline_range"})
    within_std: bool = field(metadata={"help": "|gap| <= baseline_std"})


@dataclass(frozen=True, kw_only=True)
class Study(Measured):
    """All variants."""

    schema_version: int = field(metadata={"help": "version of this format"})
    settings: Settings = field(metadata={"help": "of every training"})
    parameters: int = field(metadata={"help": "of the model"})
    compressed: float = field(metadata={"help": "share of its parameters that a preset compresses"})
    outcomes: dict[str, Outcome] = field(metadata={"help": "by variant"})
    comparisons: tuple[Comparison, ...] = field(metadata={"help": "with the baseline"})
    seconds: float = field(metadata={"help": "of the study so far"})


def read(path: Path) -> Study:
    """Read and check a study's file.

    Raises:
        ValueError: not a file of this format; names the file and the first fault.
    """
    return read_record(Study, path, SCHEMA_VERSION)
