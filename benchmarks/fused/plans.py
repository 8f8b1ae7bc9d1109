"""All that is measured of the fused ops."""

from collections.abc import Iterator

from benchmarks.fused.adamw import adamw_plans
from benchmarks.fused.block import block_plans
from benchmarks.fused.mlp import mlp_plans
from benchmarks.fused.norms import norm_plans
from benchmarks.fused.quantize import quantize_plans
from benchmarks.fused.settings import settings_for
from benchmarks.fused.train_step import train_step_plans
from benchmarks.sweep.plan import Kind, Plan

__all__ = ["fused_plans"]


def fused_plans(kind: Kind, quick: bool = False) -> Iterator[Plan]:
    """Norms, optimizer, MLP and skip, quantisation, a block, a training step; see `settings_for`."""
    settings = settings_for(kind, quick)
    yield from norm_plans(settings)
    yield from adamw_plans(settings)
    yield from mlp_plans(settings)
    yield from quantize_plans(settings)
    yield from block_plans(settings)
    yield from train_step_plans(settings)
