"""Cases of AdamW over one rank's shards of a model: against PyTorch's, with 8-bit moments, with averages.

What a step moves is counted by `kernels.adamw`: an fp32 element 28 bytes, 8 more with its average.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Cost, Gate, Setup
from benchmarks.fused.settings import Settings
from benchmarks.sweep.contest import contest
from benchmarks.sweep.draw import draws
from benchmarks.sweep.errors import relative_error
from benchmarks.sweep.plan import OURS, LeftOut, Plan
from dtrain.kernels.adamw import update_bytes
from dtrain.optim import AdamW, Average, Moments, has_codes
from dtrain.sharding.placement import placement
from uvit import UViT

__all__ = ["Averaging", "Shards", "Update", "adamw_plans"]

_LR, _BETAS, _WEIGHT_DECAY, _EMA_WEIGHT = 2e-4, (0.9, 0.99), 0.03, 0.01
_CHECKED_STEPS = 3

# From parameters and their averages, if any, to what takes a step.
Optimizer = Callable[[list[nn.Parameter], list[Tensor] | None], Callable[[], object]]


class Averaging:
    """An optimizer of PyTorch, then the averages in a pass of their own."""

    def __init__(self, parameters: list[nn.Parameter], averages: list[Tensor] | None, **how: bool) -> None:
        self.parameters, self.averages = parameters, averages
        self.optimizer = torch.optim.AdamW(parameters, _LR, _BETAS, weight_decay=_WEIGHT_DECAY, **how)

    @torch.no_grad()
    def __call__(self) -> None:
        self.optimizer.step()
        if self.averages is not None:
            torch._foreach_lerp_(self.averages, list(self.parameters), _EMA_WEIGHT)


def ours(
    parameters: list[nn.Parameter], averages: list[Tensor] | None, moments: Moments = "fp32"
) -> Callable[[], object]:
    """Averages, if any, in the same pass."""
    optimizer = AdamW(parameters, _LR, _BETAS, weight_decay=_WEIGHT_DECAY, moments=moments, backend="triton")
    ema = None if averages is None else Average(dict(zip(parameters, averages, strict=True)), _EMA_WEIGHT)
    return partial(optimizer.step, ema=ema)


class Shards:
    """Rank 0's part of every parameter of the settings' model, and their gradients."""

    def __init__(self, settings: Settings, averaged: bool) -> None:
        self.settings, self.averaged = settings, averaged
        with torch.device("meta"):
            model = UViT(settings.model)
        self.shapes = [_cut(p, settings.shards) for p in model.parameters()]

    def cost(self, moments: Moments) -> Cost:
        ema = torch.float32 if self.averaged else None
        moved = 0
        for rows, *rest in self.shapes:
            coded = has_codes(torch.empty(rows, *rest, device="meta"), moments)
            moved += update_bytes(rows, torch.Size(rest).numel(), coded=coded, ema=ema)
        return Cost(0, moved, "gradients read; parameters and all state read and written")

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def draw(self, dtype: torch.dtype) -> tuple[list[nn.Parameter], list[Tensor] | None]:
        """Parameters with gradients, and averages; always the same."""
        draw = draws(self.settings)
        parameters = []
        for shape in self.shapes:
            parameter = nn.Parameter((0.02 * draw(*shape)).to(dtype))
            parameter.grad = (1e-3 * draw(*shape)).to(dtype)
            parameters.append(parameter)
        return parameters, [p.detach().clone() for p in parameters] if self.averaged else None

    @cached_property
    def exact(self) -> list[Tensor]:
        return Update(self, Averaging, torch.float64).changes


def _cut(parameter: Tensor, ranks: int) -> tuple[int, ...]:
    """Sizes of the first rank's part."""
    dim = placement(parameter, ranks).dim
    return tuple(-(-size // ranks) if i == dim else size for i, size in enumerate(parameter.shape))


class Update:
    """One step; gradients are the same in every step."""

    def __init__(self, shards: Shards, optimizer: Optimizer, dtype: torch.dtype = torch.float32) -> None:
        self.shards = shards
        self.parameters, self.averages = shards.draw(dtype)
        self.step = optimizer(self.parameters, self.averages)

    def __call__(self) -> None:
        self.step()

    @cached_property
    def changes(self) -> list[Tensor]:
        """What the first steps have done to all parameters, and to their averages."""
        before = self._values()
        for _ in range(_CHECKED_STEPS):
            self.step()
        return [now - old for now, old in zip(self._values(), before, strict=True)]

    def _values(self) -> list[Tensor]:
        """All parameters as one tensor, and all averages."""
        groups: list[Sequence[Tensor]] = [self.parameters]
        groups += [] if self.averages is None else [self.averages]
        return [torch.cat([x.detach().flatten() for x in group]) for group in groups]

    def errors(self) -> Tensor:
        """Of the parameters' changes, and of the averages', relative to fp64."""
        pairs = zip(self.changes, self.shards.exact, strict=True)
        return torch.tensor([relative_error(got, want) for got, want in pairs])


_TWICE = Gate(
    "error of updates over the baseline's",
    2.0,
    lambda work, base: float((work.errors() / base.errors()).max()),
)
# Moments of four significant bits, rounded by chance: an update is a few hundredths off.
_EIGHT_BIT = Gate("error of updates", 0.1, lambda work, _: float(work.errors().max()))


def adamw_plans(settings: Settings) -> Iterator[Plan]:
    """Of fp32 parameters, whatever the settings compute in."""
    settings = replace(settings, dtype=torch.float32)
    plain = Shards(settings, averaged=False)
    averaged = Shards(settings, averaged=True)
    yield _plan(settings, "adamw_fp32", "AdamW", plain, "fp32", _TWICE)
    yield _plan(settings, "adamw_8bit", "AdamW, moments of 8 bits", plain, "8bit", _EIGHT_BIT)
    yield _plan(settings, "adamw_ema", "AdamW and averages", averaged, "fp32", _TWICE)


def _plan(settings: Settings, name: str, title: str, shards: Shards, moments: Moments, gate: Gate) -> Plan:
    return Plan(name, 0, partial(_make, settings, name, title, shards, moments, gate))


def _make(
    settings: Settings, name: str, title: str, shards: Shards, moments: Moments, gate: Gate
) -> tuple[Case, list[LeftOut]]:
    optimizers: dict[str, Any] = {
        "AdamW fused": partial(Averaging, fused=True),
        "AdamW foreach": partial(Averaging, foreach=True),
        OURS: partial(ours, moments=moments),
    }
    works: dict[str, Setup] = {label: partial(Update, shards, how) for label, how in optimizers.items()}
    title = f"{title}, {shards.numel / 1e6:.1f}M parameters in {len(shards.shapes)} tensors"
    return contest(name, title, settings, works, {}, shards.cost(moments), (gate,), queue_ms=10.0)
