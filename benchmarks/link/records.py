"""What the ranks of one start write down; `worker` writes it, `launch` reads it."""

from dataclasses import dataclass, field

__all__ = ["RankRecord", "Record"]


@dataclass
class Record:
    """What one rank saw of one variant; a tuple has an item a measured step."""

    preset: str
    """In use; of auto, what it chose."""
    step_s: tuple[float, ...] = ()
    cpu_s: tuple[float, ...] = ()
    """CPU time of this rank's process, all its threads together."""
    sent_bytes: tuple[int, ...] = ()
    """By the counter of the interface."""
    meter_bytes: tuple[float, ...] = ()
    """By the meter of the compressed collectives; empty without them."""
    page_faults: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    """Of this rank's batch, before the step's update."""
    sampled: dict[str, float] = field(default_factory=dict)
    """What the meter said of a sampled step."""
    said: tuple[str, ...] = ()
    """What the compressed collectives said at the start."""


@dataclass
class RankRecord:
    """What one rank saw."""

    parameters: int
    records: dict[str, Record]
