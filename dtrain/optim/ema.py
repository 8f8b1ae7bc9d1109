"""Exponential moving average of the parameters, sharded like them.

ema <- ema + (1 - decay) * (parameter - ema), in fp32. The averages are DTensors with the parameters' own
placements, so that a checkpoint stores every rank's shard and loads on any mesh. (Plain local tensors under
the same keys would be taken for replicas and all but rank 0's dropped.)

Averages in bf16 are rounded by chance. To nearest they would stand still: a step changes one by 1 - decay, a
ten-thousandth, of its distance to the parameter, and bf16 numbers lie 2^-8 to 2^-7 of themselves apart. Right
in mean, such an average has a noise of variance |parameter - average| · gap / 2, with `gap` the distance of
bf16 numbers there: each step adds |change| · gap and forgets 2 (1 - decay) of what was. Where parameters are
off their averages by 1 % of themselves that is a noise of about half a percent.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.kernels.rounding import Runs, mix, stochastic_bf16
from dtrain.sharding.local import local_part, runs
from dtrain.sharding.precision import DTYPES, Precision

_PURPOSE = 0x0E3A  # tells this noise from that of the optimizer's pass
_PIECE = 2**20  # elements that are averaged at a time: their random words take 8 bytes each


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the parameters."""

    enabled: bool = field(default=True, metadata={"help": "Keep an average; samples are drawn from it."})
    decay: float = field(default=0.9999, metadata={"help": "Decay per step, in [0, 1)."})
    warmup: bool = field(
        default=True,
        metadata={"help": "Start with a shorter memory: decay = min(decay, (1 + step) / (10 + step))."},
    )
    dtype: Precision = field(
        default="fp32",
        metadata={"help": "How averages are kept: fp32, 4 bytes a parameter, or bf16, 2, rounded by chance."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay = {self.decay}: must be in [0, 1).")
        if self.dtype not in DTYPES:
            raise ValueError(f'ema.dtype = {self.dtype!r}: must be "fp32" or "bf16".')


def decay_at(config: EMAConfig, step: int) -> float:
    """The decay of update number `step` (from 0)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Average(NamedTuple):
    """What an optimizer needs to average parameters in the pass that updates them."""

    shards: Mapping[nn.Parameter, Tensor]
    """Averages, sharded like their parameters."""
    weight: float
    """Of the parameters, 1 - decay."""
    seed: int = 0
    """Of what `take_in` rounds by chance at this step."""

    @torch.no_grad()
    def take_in(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average in some parameters by themselves; an optimizer's pass does it along the way."""
        chosen = set(parameters)
        plain: list[tuple[Tensor, Tensor]] = []
        for number, (parameter, average) in enumerate(self.shards.items()):
            if parameter not in chosen:
                continue
            pair = local_part(average), local_part(parameter.detach())
            if average.dtype == torch.float32:
                plain.append(pair)
            else:
                _average_by_chance(*pair, self.weight, mix(self.seed, number), runs(parameter))
        if plain:
            torch._foreach_lerp_([e for e, _ in plain], [p.float() for _, p in plain], self.weight)


def _average_by_chance(average: Tensor, parameter: Tensor, weight: float, seed: int, places: Runs) -> None:
    """In place, on a rank's part of a parameter; `places` are those of its elements in the whole."""
    flat, current = average.view(-1), parameter.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        exact = piece.float()
        exact = exact + (current[start : start + _PIECE].float() - exact) * weight
        piece.copy_(stochastic_bf16(exact, places.words(seed, start, len(piece), piece.device)))


class EMA:
    """Averages of a model's trainable parameters, by name.

    Args:
        model: sharded or not; its parameters must be filled already.
        config: decay, warm-up, precision.
        seed: the run's.
    """

    def __init__(self, model: nn.Module, config: EMAConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shards: dict[str, Tensor] = {
            name: p.detach().clone().to(DTYPES[config.dtype]) for name, p in self._parameters.items()
        }

    def at(self, step: int) -> Average:
        """What averages in the parameters of update number `step` (from 0): `AdamW.step(ema=...)`."""
        shards = {parameter: self.shards[name] for name, parameter in self._parameters.items()}
        return Average(shards, 1 - decay_at(self.config, step), mix(self.seed, _PURPOSE, step))

    def update(self, step: int) -> None:
        """Average in the parameters after update number `step` (from 0) of an optimizer that does not."""
        self.at(step).take_in(self._parameters.values())

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Run the body with the averages in place of the model's parameters.

        bf16 parameters are the averages rounded to nearest meanwhile; all come back bit for bit.
        """
        kept = self._put_in(model)
        try:
            yield
        finally:
            self._put_back(model, kept)

    @torch.no_grad()
    def _put_in(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what the parameters were, where an average's memory cannot hold it bit for bit."""
        self._forget_gathered(model)
        kept: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            average, current = local_part(self.shards[name]), local_part(parameter)
            if average.dtype == current.dtype:
                _exchange(average, current)
            else:
                kept[name] = current.clone()
                current.copy_(average)
        return kept

    @torch.no_grad()
    def _put_back(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        self._forget_gathered(model)
        for name, parameter in self._parameters.items():
            current = local_part(parameter)
            if name in kept:
                current.copy_(kept[name])
            else:
                _exchange(local_part(self.shards[name]), current)

    def _forget_gathered(self, model: nn.Module) -> None:
        """No gathered copy of the old values may outlive the swap, and no copy under way read the new."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if any(_on_host(parameter) for parameter in self._parameters.values()):
            torch.cuda.synchronize()


def _exchange(a: Tensor, b: Tensor) -> None:
    kept = b.clone()
    b.copy_(a)
    a.copy_(kept)


def _on_host(parameter: Tensor) -> bool:
    """Whether it is in the host's memory while a GPU computes (`shard.cpu_offload`)."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type
