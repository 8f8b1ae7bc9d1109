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

    def __post_init__(self) -> None:
        if self.hang_s < 0:
            raise ValueError(f"faults.hang_s = {self.hang_s}: must be 0 or more.")
