"""`--fit`: the fastest settings that fit, by simulating them.

Tried are micro-batches of 1, 2, 4 … samples that the global batch allows, each with policies from the one
that recomputes nothing to the one that keeps least; larger ones are not tried once none fits.
"""

from collections.abc import Iterator
from dataclasses import replace

from dtrain.config import RunConfig
from dtrain.plan.devices import Planned
from dtrain.plan.estimate import Rates
from dtrain.plan.plan import Plan, make_plan

__all__ = ["find_fit"]

_POLICIES = (
    ("none", 1),
    ("none", 4),
    ("selective", 1),
    ("selective", 4),
    ("full", 4),
)  # activations.policy, activations.mlp_chunks


def find_fit(
    config: RunConfig, gpus: int, gpu: Planned, rates: Rates
) -> tuple[Plan | None, list[tuple[str, str]]]:
    """The plan of the shortest estimated step that fits, None where none does; and rows of what was tried."""
    best: Plan | None = None
    tried = []
    for size in _sizes(config, gpus):
        some_fit = False
        for policy, chunks in _POLICIES:
            plan = make_plan(_with(config, size, policy, chunks), gpus, gpu, rates)
            tried.append((f"tried {size} x {policy}, {chunks} chunks", _words(plan)))
            some_fit |= plan.fits
            # Of equals, where the wire hides what is computed again, the one that keeps more.
            if plan.fits and (best is None or plan.estimate.step_s < 0.999 * best.estimate.step_s):
                best = plan
        if not some_fit:
            break
    return best, tried


def _sizes(config: RunConfig, gpus: int) -> Iterator[int]:
    """Micro-batches that divide what a GPU has of the global batch."""
    each = config.train.global_batch // gpus
    size = 1
    while size <= each:
        if each % size == 0:
            yield size
        size *= 2


def _with(config: RunConfig, size: int, policy: str, chunks: int) -> RunConfig:
    activations = replace(config.activations, policy=policy, mlp_chunks=chunks)  # type: ignore[arg-type]
    return replace(config, train=replace(config.train, micro_batch=size), activations=activations)


def _words(plan: Plan) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    return f"{plan.peak.nbytes / 2**30:.2f} GiB, {plan.estimate.step_s:.3g} s a step, {verdict}"
