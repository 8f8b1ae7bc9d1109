"""All that is measured of attention."""

from collections.abc import Iterator

from benchmarks.attention.layer import layer_plans
from benchmarks.attention.norm_rope import norm_rope_plans
from benchmarks.attention.operation import dense_plans, window_plans
from benchmarks.attention.settings import settings_for
from benchmarks.sweep.plan import Kind, Plan

__all__ = ["attention_plans"]


def attention_plans(kind: Kind, quick: bool = False) -> Iterator[Plan]:
    """The operation, windows, QK-norm and rotation, the layer; see `settings_for`."""
    settings = settings_for(kind, quick)
    yield from dense_plans(settings)
    yield from window_plans(settings)
    yield from norm_rope_plans(settings)
    yield from layer_plans(settings)
