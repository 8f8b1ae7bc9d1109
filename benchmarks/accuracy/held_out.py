"""The held-out loss: the same clips, times and noises for every variant, seed and step.

It is taken on whole fp32 weights in a plain model: no codec has touched them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from benchmarks.accuracy.clips import Clips
from benchmarks.accuracy.settings import Settings
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG
from dtrain.sharding.mesh import mean_over

__all__ = ["HeldOut", "whole"]

_SEED = 20_000
_BATCH = 64


def whole(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of shards, on every rank; gathered as they are."""
    return {name: s.full_tensor() if isinstance(s, DTensor) else s for name, s in shards.items()}


class _KeptDraws(SampleRNG):
    """Draws that are made once: every later call gets the same tensors."""

    def __init__(self, seed: int, index: Sequence[int]) -> None:
        super().__init__(seed, index)
        self._kept: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        key = ("normal", name, tuple(shape))
        if key not in self._kept:
            self._kept[key] = super().normal(name, shape)
        return self._kept[key]

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        key = ("uniform", name, tuple(shape))
        if key not in self._kept:
            self._kept[key] = super().uniform(name, shape)
        return self._kept[key]


class HeldOut:
    """The held-out set, a part of it on each rank.

    Args:
        clips: what no training sees.
        settings: how many times and noises each clip has.
        recipe: brings the model and its loss.
        mesh: over which the set is divided.
    """

    def __init__(self, clips: Clips, settings: Settings, recipe: Recipe, mesh: DeviceMesh) -> None:
        self._recipe, self._mesh = recipe, mesh
        self._model = recipe.build().requires_grad_(False)
        mine = range(mesh.get_rank(), settings.held_out * settings.draws, mesh.size())
        parts = [mine[start : start + _BATCH] for start in range(0, len(mine), _BATCH)]
        self._parts: list[tuple[Batch, _KeptDraws]] = [
            (clips.batch([i // settings.draws for i in part], part), _KeptDraws(_SEED, part))
            for part in parts
        ]

    @torch.no_grad()
    def loss(self, shards: Mapping[str, Tensor], parts: int | None = None) -> float:
        """Mean loss of the model with these weights, on every rank the same number.

        Args:
            shards: of all parameters.
            parts: of 64 samples a rank, to look at; all where None.
        """
        self._model.load_state_dict(whole(shards))
        total = torch.zeros((), dtype=torch.float64)
        samples = 0
        for batch, draws in self._parts[:parts]:
            size = len(batch["index"])
            total += self._recipe.loss(self._model, batch, draws).double() * size
            samples += size
        return float(mean_over(self._mesh, total / samples))
