"""How long a step would take: an estimate, by rates that are assumed and said.

    compute    Σ over operators of max(FLOPs / (e · peak), bytes / (m · bandwidth))
    wire       Σ over collectives of bytes / rate + latency
    step       compute + max(0, wire - compute) + the first collective and the last, which nothing hides

The optimizer's pass is counted by the bytes of its state.
"""

from dataclasses import dataclass

import torch

from dtrain.metrics.flops import peak_flops
from dtrain.plan.accounts import STATE
from dtrain.plan.devices import Planned
from dtrain.plan.observe import Observed
from dtrain.plan.wire import Sent

__all__ = ["Estimate", "Rates", "estimate"]


@dataclass(frozen=True)
class Rates:
    """What is assumed.

    Attributes:
        per_node: GPUs of a node.
        link_bytes_per_s: that a GPU sends within its node.
        port_bytes_per_s: that a GPU sends to other nodes.
        latency_s: of a collective.
        products: share of the peak that matrix products reach.
        copies: share of the bandwidth that all else reaches.
    """

    per_node: int = 8
    link_bytes_per_s: float = 350e9
    port_bytes_per_s: float = 50e9
    latency_s: float = 30e-6
    products: float = 0.6
    copies: float = 0.8

    def said(self) -> str:
        """In words."""
        return (
            f"products at {self.products:.0%} of the peak, the rest at {self.copies:.0%} of the bandwidth; "
            f"nodes of {self.per_node}, {self.link_bytes_per_s / 1e9:.0f} GB/s a GPU inside and "
            f"{self.port_bytes_per_s * 8e-9:.0f} Gbit/s between; {1e6 * self.latency_s:.0f} us a collective"
        )


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, and what it computes and sends."""

    compute_s: float
    wire_s: float
    exposed_s: float
    update_s: float
    flops: int
    wire_bytes: int

    @property
    def step_s(self) -> float:
        """Of the whole step."""
        return self.compute_s + self.exposed_s + self.update_s


def estimate(simulation: Observed, gpu: Planned, rates: Rates, repeats: float = 1.0) -> Estimate:
    """Price a step.

    Args:
        simulation: of some of its micro-batches.
        gpu: on which.
        rates: assumed.
        repeats: micro-batches of a step over those of the simulation.
    """
    peak = peak_flops(gpu.name, torch.bfloat16)
    assert peak is not None, f"{gpu.name} has no peak in dtrain.metrics.flops"
    compute = repeats * sum(
        max(work.flops / (rates.products * peak), work.nbytes / (rates.copies * gpu.bytes_per_s))
        for work in simulation.work
    )
    times = [_seconds(sent, rates) for sent in simulation.sent]
    wire = repeats * sum(times)
    ends = times[0] + times[-1] if times else 0.0
    state = sum(n for name, n in zip(simulation.accounts, simulation.start, strict=True) if name in STATE)
    return Estimate(
        compute_s=compute,
        wire_s=wire,
        exposed_s=min(wire, max(0.0, wire - compute) + ends),
        update_s=2 * state / (rates.copies * gpu.bytes_per_s),
        flops=round(repeats * sum(work.flops for work in simulation.work)),
        wire_bytes=round(repeats * sum(sent.wire_bytes for sent in simulation.sent)),
    )


def _seconds(sent: Sent, rates: Rates) -> float:
    rate = rates.link_bytes_per_s if sent.ranks <= rates.per_node else rates.port_bytes_per_s
    return sent.wire_bytes / rate + rates.latency_s if sent.ranks > 1 else 0.0
