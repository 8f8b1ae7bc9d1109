"""Steps whose loss or gradient is not finite, or whose loss jumps: all ranks pass over the update together.

Loss and gradient norm are those of all ranks, so that each decides alike. To decide the host waits for them
before it queues the update. What was consumed stays consumed; weights, moments and averages are untouched,
and what collectives remember begins anew, since rounding errors of such a gradient are no numbers either.

Where it happens several times in a row the weights may be to blame: the run goes back to its newest
checkpoint and leaves out the samples that it met meanwhile. If that does not help, it ends.
"""

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtrain.faults.config import FaultConfig
from dtrain.faults.errors import RunFault
from dtrain.sharding.mesh import mean_over
from dtrain.step import StepResult

__all__ = ["BadRun", "Judge", "RollBack"]

log = logging.getLogger(__name__)

_WINDOW = 32  # losses that a jump is told by
_NAMED = 8  # samples in a message


class BadRun(RunFault):
    """Going back did not help."""


@dataclass
class RollBack(Exception):
    """Too many updates in a row were passed over.

    Attributes:
        checkpoint: to go back to; None is the start of the run.
        left_out: indices to pass over from now on, see `dtrain.recipe.DataState`.
        said: what was wrong with the last one.
        saved: whether there is a checkpoint since the run went back before.
    """

    checkpoint: Path | None
    left_out: tuple[tuple[int, int], ...]
    said: str
    saved: bool


class _Seen(NamedTuple):
    """A rank's part of a step."""

    losses: list[float]
    samples: list[list[int]]

    def not_finite(self) -> list[int]:
        """Samples of those micro-batches."""
        batches = zip(self.losses, self.samples, strict=True)
        return [index for loss, batch in batches if not math.isfinite(loss) for index in batch]


class Judge:
    """Decides about every step before its update is made.

    Args:
        config: of the run.
        mesh: of the model.
        losses: of accepted steps, the newest last, from the checkpoint.
    Attributes:
        losses: the same, kept where `faults.spike_factor` needs them.
        in_a_row: updates that were passed over since the last that was made.
        said: about the last one.
    """

    def __init__(self, config: FaultConfig, mesh: DeviceMesh, losses: Iterable[float] = ()) -> None:
        self._config, self._mesh = config, mesh
        self.losses = list(losses)
        self.in_a_row = 0
        self.said = ""

    def accepts(self, step: int, result: StepResult, samples: Sequence[Tensor]) -> bool:
        """Whether the update may be made; the same on every rank.

        Args:
            step: counted from 1.
            result: of this rank.
            samples: (B,) global indices of each of its micro-batches.
        """
        loss = mean_over(self._mesh, result.loss)
        loss, norm = torch.stack([loss, result.grad_norm.to(loss.device)]).tolist()
        fault = self._fault(loss, norm)
        if not fault:
            self.in_a_row = 0
            if self._config.spike_factor:
                self.losses = [*self.losses, loss][-_WINDOW:]
            return True
        self.in_a_row += 1
        where = _where(_Seen(result.losses.tolist(), [index.tolist() for index in samples]))
        self.said = f"step {step}: {fault}, the update is passed over ({self.in_a_row} in a row); {where}"
        if dist.get_rank() == 0:
            log.warning("%s", self.said)
        return False

    def _fault(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g}, gradient norm {norm:g}"
        factor = self._config.spike_factor
        if factor and len(self.losses) == _WINDOW:
            usual = statistics.median(self.losses)
            if loss > factor * usual:
                return f"loss {loss:g} is over {factor:g} times the usual {usual:g}"
        return ""


def _where(mine: _Seen) -> str:
    """Whose loss is not finite; all ranks call it."""
    everyone: list[_Seen] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {rank: seen.not_finite() for rank, seen in enumerate(everyone)}
    parts = [f"rank {rank}: {_listed(samples)}" for rank, samples in found.items() if samples]
    if parts:
        return f"losses that are not finite are of samples, {'; '.join(parts)}"
    samples = sorted(i for seen in everyone for batch in seen.samples for i in batch)
    return f"every rank's loss is finite; samples {_listed(samples)}"


def _listed(samples: Sequence[int]) -> str:
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return ", ".join(map(str, samples[:_NAMED])) + more
