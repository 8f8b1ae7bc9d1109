"""`--fit`: the fastest settings that fit, by simulating a few.

Rungs are ways to keep less, the fastest first; none changes a result but by the order of sums. For each
micro-batch (1, 2, 4 … samples, as the global batch allows) the first rung that fits is taken. A larger one
holds more, so it begins where the smaller one ended; where no rung fits, the search ends. A budget is what
`full` leaves of the GPU. Copies to the host's memory are taken to hide behind compute.

Only where nothing fits, numbers are rounded: averages, then moments, then block inputs. What that saves of
the state is known by arithmetic, so only what can fit is simulated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dtrain.config import RunConfig, build_recipe
from dtrain.dryrun import state_bytes
from dtrain.plan.devices import Planned
from dtrain.plan.estimate import Rates
from dtrain.plan.plan import Plan, make_plan, room
from dtrain.sharding.precision import convert_weights

__all__ = ["Fit", "find_fit"]


class _Rung(NamedTuple):
    """Fields of `[activations]`."""

    policy: str
    mlp_chunks: int = 1
    stash: str = "device"


_RUNGS = (
    _Rung("none"),
    _Rung("none", 4),
    _Rung("budget"),
    _Rung("selective"),
    _Rung("full"),
    _Rung("full", 4),
    _Rung("full", 4, "host"),
)
_ROUNDING_RUNGS = (_Rung("full", 4, "int8"),)  # fp8 takes as many bytes
# Averages only draw samples; moments decide steps.
_ROUNDINGS: tuple[Mapping[str, Any], ...] = (
    {"ema.dtype": "bf16"},
    {"optim.moments": "8bit"},
    {"ema.dtype": "bf16", "optim.moments": "8bit"},
)
# Of what is left to a budget, which counts what blocks keep and not what they hold while they run.
_BUDGET_SHARE = 0.95


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        plan: of the shortest estimated step; None where nothing that was tried fits.
        settings: of the config that it changes, by "section.field".
        rounds: those of them that change numbers, not only where they lie.
        tried: rows for a table.
    """

    plan: Plan | None
    settings: Mapping[str, Any]
    rounds: tuple[str, ...]
    tried: list[tuple[str, str]]


class _Found(NamedTuple):
    """A plan that was simulated, with what it changes."""

    plan: Plan
    settings: Mapping[str, Any]


def find_fit(config: RunConfig, gpus: int, gpu: Planned, rates: Rates) -> Fit:
    """Search: what is exact first, then what rounds the least."""
    search = _Search(config, gpus, gpu, rates)
    rounding: Mapping[str, Any] = {}
    best = search.climb(rounding, _RUNGS)
    for wider in _ROUNDINGS:
        if best is None and search.state_bytes(wider) < search.state_bytes(rounding):
            best, rounding = search.climb(wider, _RUNGS), wider
    if best is None:
        best = search.climb(rounding, _ROUNDING_RUNGS)
    if best is None:
        return Fit(None, {}, (), search.tried)
    rounds = tuple(name for name, value in best.settings.items() if value in ("bf16", "8bit", "int8"))
    return Fit(best.plan, best.settings, rounds, search.tried)


class _Search:
    """What was simulated, and what it says of what was not."""

    def __init__(self, config: RunConfig, gpus: int, gpu: Planned, rates: Rates) -> None:
        self.config, self.gpus, self.gpu, self.rates = config, gpus, gpu, rates
        self.tried: list[tuple[str, str]] = []
        self._state_bytes: dict[str, int] = {}
        self._beside: dict[tuple[int, _Rung], int] = {}  # bytes at the peak that are not state
        self._found: dict[str, _Found | None] = {}

    def climb(self, rounding: Mapping[str, Any], rungs: Sequence[_Rung]) -> _Found | None:
        """The fastest of all micro-batches, each on the first rung that fits."""
        if (least := min(self._known(1, rung, rounding) for rung in rungs)) > room(self.gpu):
            self.tried.append((_name(rounding), f"{_gib(least)} or more, by arithmetic: does not fit"))
            return None
        best, first = None, 0
        for size in _sizes(self.config, self.gpus):
            found = None
            while first < len(rungs) and found is None:
                if self._known(size, rungs[first], rounding) <= room(self.gpu):
                    found = self._fitting(size, rungs[first], rounding)
                first += found is None
            if found is None:
                break
            # Of equals, where the wire hides what is computed again, the one that keeps more.
            if best is None or found.plan.estimate.step_s < 0.999 * best.plan.estimate.step_s:
                best = found
        return best

    def state_bytes(self, rounding: Mapping[str, Any]) -> int:
        """What stays on the GPU between steps, by arithmetic."""
        name = _name(rounding)
        if name not in self._state_bytes:
            self._state_bytes[name] = _state_bytes(_with(self.config, rounding), self.gpus)
        return self._state_bytes[name]

    def _known(self, size: int, rung: _Rung, rounding: Mapping[str, Any]) -> int:
        """Bytes that it takes at the least, by what was simulated with other roundings."""
        return self.state_bytes(rounding) + self._beside.get((size, rung), 0)

    def _fitting(self, size: int, rung: _Rung, rounding: Mapping[str, Any]) -> _Found | None:
        """The plan, where it fits."""
        settings = {"train.micro_batch": size, **_fields(rung), **rounding}
        if rung.policy == "budget":
            full = self._planned({**settings, **_fields(_Rung("full"))})
            if full is not None:
                self._beside[size, rung] = full.plan.peak.nbytes - self.state_bytes(rounding)
            left = room(self.gpu) - full.plan.peak.nbytes if full else 0
            settings["activations.budget_gib"] = round(_BUDGET_SHARE * left / 2**30, 4)
            if settings["activations.budget_gib"] <= 0:
                return None
        found = self._planned(settings)
        if found is None:
            return None
        if rung.policy != "budget":
            self._beside[size, rung] = found.plan.peak.nbytes - self.state_bytes(rounding)
        return found if found.plan.fits else None

    def _planned(self, settings: Mapping[str, Any]) -> _Found | None:
        """Simulated, once; None where the config or the model refuses the settings, which is said."""
        name = _name(settings)
        if name not in self._found:
            try:
                plan = make_plan(_with(self.config, settings), self.gpus, self.gpu, self.rates)
            except ValueError as error:
                self._found[name] = None
                self.tried.append((name, f"cannot be: {error}"))
            else:
                self._found[name] = _Found(plan, settings)
                self.tried.append((name, _words(plan)))
        return self._found[name]


def _state_bytes(config: RunConfig, gpus: int) -> int:
    if config.shard.cpu_offload:
        return 0
    with torch.device("meta"):
        model = build_recipe(config).build()
    convert_weights(model, config.optim.weights)
    shard, ema = config.mesh.sizes(gpus)[1], config.ema
    held = state_bytes(model, shard, ema=ema.enabled, moments=config.optim.moments, average=ema.dtype)
    return held.total


def _sizes(config: RunConfig, gpus: int) -> Iterator[int]:
    """Micro-batches that divide what a GPU has of the global batch."""
    each = config.train.global_batch // gpus
    size = 1
    while size <= each:
        if each % size == 0:
            yield size
        size *= 2


def _fields(rung: _Rung) -> dict[str, Any]:
    return {f"activations.{name}": value for name, value in rung._asdict().items()}


def _with(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    changed = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return replace(config, **changed)


def _name(settings: Mapping[str, Any]) -> str:
    """Such as "tried 2 x full, 4 chunks, stash host, optim.moments 8bit"."""
    plain = {name.removeprefix("activations."): value for name, value in settings.items()}
    size, policy, budget = (plain.pop(name, None) for name in ("train.micro_batch", "policy", "budget_gib"))
    chunks = plain.pop("mlp_chunks", 1)
    parts = [] if policy is None else [f"{size} x {policy}" + (f" of {budget} GiB" if budget else "")]
    parts += [f"{chunks} chunks"] if chunks > 1 else []
    parts += [f"{name} {value}" for name, value in plain.items() if value != "device"]
    return f"tried {', '.join(parts)}" if parts else "the config's state"


def _words(plan: Plan) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    return f"{_gib(plan.peak.nbytes)}, {plan.estimate.step_s:.3g} s a step, {verdict}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
