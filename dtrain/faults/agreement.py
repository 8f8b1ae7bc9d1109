"""What ranks must know alike, told from step to step: two bytes that travel while the next step runs.

A signal reaches ranks at different steps, and their disks are ready at different times. What one of them says
after a step, all of them know after the next one, without waiting for each other.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Agreed", "Agreement"]


class Agreed(NamedTuple):
    """What was said after the step before."""

    stop: bool = False
    """By any rank: the run was asked to end."""
    written: bool = False
    """By all ranks: the save in flight is on the disk."""


class Agreement:
    """Every rank owns one and calls `exchange` after each step.

    Args:
        group: with a CPU backend, for these messages alone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._said: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, stop: bool, written: bool) -> Agreed:
        """Say what is true of this rank; returns what is known of all."""
        known = self.finish()
        self._said = torch.tensor([stop, not written], dtype=torch.uint8)
        self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, self._group, async_op=True)
        return known

    def finish(self) -> Agreed:
        """Wait for what is on its way."""
        if self._work is None or self._said is None:
            return Agreed()
        self._work.wait()
        self._work = None
        return Agreed(bool(self._said[0]), not self._said[1])
