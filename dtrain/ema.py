"""Exponential moving average of the parameters, sharded like them.

ema <- ema + (1 - decay) * (parameter - ema), in fp32. The averages are DTensors with the parameters' own
placements, so that a checkpoint stores every rank's shard and loads on any mesh. (Plain local tensors under
the same keys would be taken for replicas and all but rank 0's dropped.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the parameters."""

    enabled: bool = field(default=True, metadata={"help": "Keep an fp32 average; samples are drawn from it."})
    decay: float = field(default=0.9999, metadata={"help": "Decay per step, in [0, 1)."})
    warmup: bool = field(
        default=True,
        metadata={"help": "Start with a shorter memory: decay = min(decay, (1 + step) / (10 + step))."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay = {self.decay}: must be in [0, 1).")


def decay_at(config: EMAConfig, step: int) -> float:
    """The decay of update number `step` (from 0)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Average(NamedTuple):
    """What an optimizer needs to average parameters in the pass that updates them."""

    shards: Mapping[nn.Parameter, Tensor]
    """Averages, sharded like their parameters."""
    weight: float
    """Of the parameters, 1 - decay."""


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """fp32 averages of a model's trainable parameters, by name.

    Args:
        model: sharded or not; its parameters must be filled already.
        config: decay and warm-up.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shards: dict[str, Tensor] = {
            name: p.detach().clone().to(torch.float32) for name, p in self._parameters.items()
        }

    def at(self, step: int) -> Average:
        """What averages in the parameters of update number `step` (from 0): `AdamW.step(ema=...)`."""
        shards = {parameter: self.shards[name] for name, parameter in self._parameters.items()}
        return Average(shards, 1 - decay_at(self.config, step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters after update number `step` (from 0) of an optimizer that does not."""
        averages = [_local(average) for average in self.shards.values()]
        current = [_local(p.detach()).float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - decay_at(self.config, step))

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Run the body with the averages in place of the model's parameters."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        # Gathered copies of the old values must not outlive the swap.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self._parameters.items():
            average, current = _local(self.shards[name]), _local(parameter)
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)
