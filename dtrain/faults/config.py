"""The `[faults]` table."""

from dataclasses import dataclass, field

__all__ = ["FaultConfig"]


@dataclass(frozen=True)
class FaultConfig:
    """What a run does about faults."""

    hang_s: float = field(
        default=300.0,
        metadata={
            "help": "Seconds without progress until the rank that hangs is named and the job ends; 0: never. "
            "Less than train.timeout_s, which counts alone until the first step is done."
        },
    )

    check_replicas_every: int = field(
        default=0,
        metadata={
            "help": "Compare the weights of all replicas every this many steps and name a rank that differs, "
            "where mesh.replicate is over 1. 0: never."
        },
    )
    max_bad_steps: int = field(
        default=5,
        metadata={
            "help": "Updates in a row that are passed over because loss or gradient is not finite, until the "
            "run goes back to its newest checkpoint and leaves their samples out. 0: every update is made."
        },
    )
    max_rollbacks: int = field(
        default=1,
        metadata={"help": "Times that it goes back without a new checkpoint since, before that is an error."},
    )
    spike_factor: float = field(
        default=0.0,
        metadata={
            "help": "A loss over this many times the median of the last 32 is passed over too; 0: none is."
        },
    )

    def __post_init__(self) -> None:
        if self.hang_s < 0:
            raise ValueError(f"faults.hang_s = {self.hang_s}: must be 0 or more.")
        for name in ("check_replicas_every", "max_bad_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"faults.{name} = {getattr(self, name)}: must be 0 or more.")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"faults.spike_factor = {self.spike_factor}: must be over 1, or 0 for none.")
        if self.spike_factor and not self.max_bad_steps:
            raise ValueError(
                "faults.spike_factor needs faults.max_bad_steps, which is 0: set it to 1 or more."
            )
