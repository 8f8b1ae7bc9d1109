"""What a run met and came through, counted on every rank and told at its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from dtrain.recipe import Batch

__all__ = ["Tally"]


@dataclass
class Tally:
    """Of this rank since the run was started or resumed."""

    skipped: set[tuple[str, str]] = field(default_factory=set)
    """(source, reason) of inputs that cannot be read."""
    worker_restarts: int = 0
    """Of data workers that died or stalled."""
    passed_over: int = 0
    """Updates that were not made."""
    rollbacks: int = 0
    failed_saves: int = 0

    def read(self, batches: Sequence[Batch]) -> None:
        """Count what a step's micro-batches tell."""
        for batch in batches:
            self.skipped.update(batch.get("skipped", ()))
            self.worker_restarts += batch.get("worker_restarts", 0)

    def gathered(self) -> "Tally":
        """Of all ranks, which call it together; what they do alike counts once."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self)
        return Tally(
            set().union(*(tally.skipped for tally in everyone)),
            sum(tally.worker_restarts for tally in everyone),
            self.passed_over,
            self.rollbacks,
            self.failed_saves,
        )
