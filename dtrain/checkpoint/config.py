"""The `[checkpoint]` table."""

from dataclasses import dataclass, field

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, where to resume."""

    every: int = field(
        default=1000, metadata={"help": "Save every this many steps; the last is always saved."}
    )
    keep: int = field(
        default=3, metadata={"help": "Newest checkpoints that are kept; older ones are deleted."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: newest intact checkpoint of the run, if any. never: start anew (the run must have "
            "none). Or the path of one checkpoint folder."
        },
    )

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} = {getattr(self, name)}: must be 1 or more.")

    @property
    def retry_every(self) -> int:
        """Steps until a save that failed is tried again."""
        return max(1, self.every // 10)
