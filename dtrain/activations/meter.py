"""The meter of what is put away: bytes, and what quantisation lost."""

import torch
from torch import Tensor

__all__ = ["StashMeter"]


class StashMeter:
    """Counts of one rank; errors stay on the device until they are read.

    Attributes:
        sample: take errors too, from now on; each costs a pass over what is put away.
    """

    def __init__(self) -> None:
        self.sample = False
        self._plain = self._kept = 0
        self._squares: list[Tensor] = []

    def put(self, plain_bytes: int, kept_bytes: int) -> None:
        """Count one tensor, as it was and what stays of it on the device."""
        self._plain += plain_bytes
        self._kept += kept_bytes

    def error(self, error: Tensor, value: Tensor) -> None:
        """Note what rounding changed beside what was rounded."""
        self._squares.append(torch.stack([error.float().square().sum(), value.float().square().sum()]))

    def read(self, steps: int = 1) -> dict[str, float]:
        """All since the last call, and begin anew; waits for the device where errors were taken.

        Args:
            steps: steps since then, of which bytes are the mean.
        Returns: `stash_mib` (inputs put away a step, in 1024² bytes), `stash_kept_mib` (what stayed of them
            on the device) and, of sampled steps, `stash_error`, ‖x - x'‖ / ‖x‖ over all of them.
        """
        values = {"stash_mib": self._plain / steps / 2**20, "stash_kept_mib": self._kept / steps / 2**20}
        if self._squares:
            error, value = torch.stack(self._squares).sum(dim=0).tolist()
            values["stash_error"] = (error / value) ** 0.5 if value else 0.0
        self._plain = self._kept = 0
        self._squares.clear()
        return values
