"""What the ranks of one start write down; `worker` writes it, `launch` reads it."""

from dataclasses import dataclass

__all__ = ["Limits", "RankRecord", "Record"]


@dataclass
class Record:
    """What one rank saw of one contestant; a tuple has an item a round."""

    stall_s: tuple[float, ...] = ()
    """Of a save with nothing beside it: until training may go on."""
    stall_cpu_s: tuple[float, ...] = ()
    """CPU time of the thread that waits, which neighbours on this machine change less."""
    written_s: tuple[float, ...] = ()
    """Of the same: until all is written."""
    load_s: tuple[float, ...] = ()
    quiet_s: tuple[float, ...] = ()
    """Median of the training steps without a save."""
    beside_s: tuple[float, ...] = ()
    """Median of those begun while a save was written."""
    lost_s: tuple[float, ...] = ()
    """By which those steps, and the stall, delayed the training."""
    steps_beside: tuple[int, ...] = ()
    wrong_bytes: tuple[int, ...] = ()
    """Of all ranks: that were others after the load."""
    disk_bytes: tuple[int, ...] = ()
    """Of all ranks."""


@dataclass
class Limits:
    """What this machine takes for the least work, by plain calls; a tuple has an item a round."""

    copy_s: tuple[float, ...] = ()
    """This rank's part of the state, to memory that is there."""
    write_s: tuple[float, ...] = ()
    """As many bytes to one file, synced."""
    hash_s: tuple[float, ...] = ()
    """SHA-256 of that file."""


@dataclass
class RankRecord:
    """What one rank saw."""

    parameters: int
    state_bytes: int
    """Of the whole tensors."""
    records: dict[str, Record]
    limits: Limits
