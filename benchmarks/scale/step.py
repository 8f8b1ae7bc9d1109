"""The time of a training step: compute, codecs, and what of the wire no compute hides.

U equal units, each with collectives g (its gather), b (its gather for the backward) and r (its sum), and
compute f forward and 2f backward, f = 2 · parameters · tokens / FLOP/s:

    step = U·(3f + codecs) + g + (U - 1)·max(0, g - f) + b + (U - 1)·max(0, b + r - 2f) + r

A unit's gather runs beside the compute of the one before; in the backward, a gather and a sum share the wire.
The first gather of each pass and the last sum run beside nothing. Codecs use the memory that compute needs:
none of their time counts as hidden.
"""

from dataclasses import dataclass

from benchmarks.scale.cluster import Cluster
from benchmarks.scale.codecs import CodecRates
from benchmarks.scale.variants import Variant, unit

__all__ = ["StepTime", "Workload", "step_time"]


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Args:
        parameters: of the whole model.
        units: that its parameters are gathered in, all of one size.
        tokens: of a GPU and step.
        flops: a second that a GPU reaches in forward and backward.
    Raises:
        ValueError: a number that is not positive.
    """

    parameters: int = 2_000_000_000
    units: int = 32
    tokens: int = 8192
    flops: float = 400e12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} = {value}: must be above 0")

    @property
    def forward_s(self) -> float:
        """Of one unit."""
        return 2 * self.parameters / self.units * self.tokens / self.flops


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they are made of.

    Args:
        compute: forward and backward.
        codecs: of all units.
        wire: of all collectives, hidden or not.
        exposed: what of it compute does not hide.
        port_bytes: that a GPU sends to other nodes.
    """

    compute: float
    codecs: float
    wire: float
    exposed: float
    port_bytes: float

    @property
    def step(self) -> float:
        return self.compute + self.codecs + self.exposed


def step_time(variant: Variant, workload: Workload, cluster: Cluster, rates: CodecRates) -> StepTime:
    """The model; see the module."""
    one = unit(variant, cluster, -(-workload.parameters // workload.units))
    f, count = workload.forward_s, workload.units
    g, b = cluster.seconds(one.forward), cluster.seconds(one.backward)
    r = sum(cluster.seconds(traffic) for traffic in one.reduce)
    behind_compute = (count - 1) * (max(0.0, g - f) + max(0.0, b + r - 2 * f))
    return StepTime(
        compute=3 * f * count,
        codecs=rates.seconds(one.codecs) * count,
        wire=(g + b + r) * count,
        exposed=g + b + r + behind_compute,
        port_bytes=one.port_bytes * count,
    )
