"""`preset = "auto"`: what pays on these links, measured at the start.

On each mesh axis the seconds that a collective takes for a byte, and on this device the seconds that each
codec takes for a number, are measured by all ranks at once: a host that ranks share is shared then too. The
time that communication takes in a step is then, for N parameters,

    t(preset) = N · bytes / rate + N · codecs + collectives · latency

as if nothing were hidden behind compute: what is saved on the wire may be hidden already, what codecs take is
not. So a preset must win by more than a margin, and by more than its own codecs take.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.codec import Cast, Codec, Quantised
from dtrain.comm.collectives import all_gather, reduce_scatter
from dtrain.comm.config import CommConfig, Preset, Scheme, scheme_of
from dtrain.comm.fsdp import Unit

__all__ = ["Choice", "Cost", "Link", "choose", "crossing", "measure_link"]

MARGIN = 0.05  # of the time without compression, that a preset must save
_CANDIDATES: tuple[Preset, ...] = ("bf16", "int8", "int8-int4", "int4-delta")
_NUMBERS = 2**20  # of a codec's measurement
_REPEATS = 3


class Link(NamedTuple):
    """One axis of the mesh, as its collectives run.

    Args:
        rate: bytes that a rank sends in a second, in an all-gather.
        latency: seconds of a collective of next to nothing.
        scatter: what FSDP2's reduce-scatter takes, in all-gathers of as many bytes.
    """

    rate: float
    latency: float
    scatter: float


class Cost(NamedTuple):
    """What a preset costs on an axis, for a step: `wire_bytes / rate + seconds`."""

    preset: Preset
    wire_bytes: float
    seconds: float

    def at(self, rate: float) -> float:
        """Seconds at a rate in bytes a second."""
        return self.wire_bytes / rate + self.seconds


@dataclass(frozen=True)
class Choice:
    """What was chosen: the scheme, or None for FSDP2's own collectives, and why, in words."""

    scheme: Scheme | None
    said: list[str]


def choose(units: Sequence[Unit], config: CommConfig) -> Choice:
    """Measure links and codecs, and choose for each axis. Every rank calls it; all choose alike."""
    first = units[0]
    numbers = sum(sum(unit.numels) for unit in units) * first.shard_group.size()
    shard, said = _choose_axis("shard", units, config, numbers)
    copies = first.replicate_group
    if copies is None or copies.size() == 1:
        return Choice(scheme_of(config, shard), said)
    replicate, more = _choose_axis("replicate", units, config, numbers)
    return Choice(_both(config, shard, replicate), said + more)


def _both(config: CommConfig, shard: Preset, replicate: Preset) -> Scheme | None:
    """One scheme of the choices for two axes; an axis that was left alone stays exact."""
    if shard == replicate == "none":
        return None
    fp32 = Cast(torch.float32)
    within = scheme_of(config, shard) or Scheme("none", fp32, False, fp32, fp32)
    between = scheme_of(config, replicate)
    return replace(
        within,
        preset="auto",
        inside=within.gradients,
        gradients=between.gradients if between else fp32,
        feedback=between.feedback if between else "none",
    )


def _choose_axis(
    axis: str, units: Sequence[Unit], config: CommConfig, numbers: int
) -> tuple[Preset, list[str]]:
    unit = units[0]
    group = unit.shard_group if axis == "shard" else unit.replicate_group
    assert group is not None
    if group.size() == 1:
        return "none", [f"auto: the {axis} axis has one rank, so nothing travels on it"]
    link = measure_link(group, unit.device)
    price = _axis_costs if axis == "shard" else _replicate_costs
    costs = price(units, config, numbers, group, link)
    best = pick(costs, link.rate)
    return best.preset, _explain(axis, costs, best, link, group)


def pick(costs: Sequence[Cost], rate: float) -> Cost:
    """The cheapest; the first, what there is without us, unless another saves more than the margin."""
    plain, best = costs[0], min(costs, key=lambda cost: cost.at(rate))
    return best if best.at(rate) < (1 - MARGIN) * plain.at(rate) else plain


def crossing(costs: Sequence[Cost], best: Cost) -> tuple[float, Preset] | None:
    """The lowest rate above which another preset costs less than the best one, and which; None where none."""
    found = [
        ((best.wire_bytes - other.wire_bytes) / (other.seconds - best.seconds), other.preset)
        for other in costs
        if other.seconds < best.seconds and other.wire_bytes > best.wire_bytes
    ]
    return min(found) if found else None


def _explain(axis: str, costs: Sequence[Cost], best: Cost, link: Link, group: dist.ProcessGroup) -> list[str]:
    table = ", ".join(f"{cost.preset} {1e3 * cost.at(link.rate):.0f} ms" for cost in costs)
    change = crossing(costs, best)
    until = f"; from {_gbit(change[0])} on {change[1]} would be" if change else "; no rate would change that"
    return [
        f"auto: the {axis} axis moves {_gbit(link.rate)} a rank among {group.size()}, "
        f"{1e6 * link.latency:.0f} us a collective; communication of a step, nothing hidden: {table}",
        f"auto: takes {best.preset} there{until}",
    ]


def _gbit(rate: float) -> str:
    return f"{rate * 8e-9:.3g} Gbit/s"


def measure_link(group: dist.ProcessGroup, device: torch.device) -> Link:
    """Time collectives of a group; sizes grow until one takes 50 ms, or is of 64 MiB."""
    others = group.size() - 1
    size = 2**16
    latency = _agreed(
        lambda: _gather(torch.empty(16, dtype=torch.uint8, device=device), group), group, device
    )
    while True:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        seconds = _agreed(lambda: _gather(message, group), group, device)  # noqa: B023
        if seconds > 0.05 or size >= 2**26:
            break
        size *= 4
    rows = torch.zeros(group.size() * size // 2, dtype=torch.bfloat16, device=device)
    scatter = _agreed(lambda: _scatter(rows, group), group, device)
    wire = max(seconds - latency, 1e-9)
    return Link(others * size / wire, latency, max(scatter - latency, 1e-9) / wire)


def _gather(message: Tensor, group: dist.ProcessGroup) -> None:
    all_gather(message.new_empty(group.size() * len(message)), message, group)


def _scatter(rows: Tensor, group: dist.ProcessGroup) -> None:
    reduce_scatter(rows.new_empty(len(rows) // group.size()), rows, group)


def _agreed(call: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds of a call, the median of some; of all ranks of all groups the longest."""
    call()
    seconds = torch.tensor(statistics.median(_timed(call, group, device) for _ in range(_REPEATS)))
    longest = seconds.to(device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def _timed(call: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    dist.barrier(group)
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _axis_costs(
    units: Sequence[Unit], config: CommConfig, numbers: int, group: dist.ProcessGroup, link: Link
) -> list[Cost]:
    """Costs of the shard axis, of FSDP2's own collectives first."""
    share = (group.size() - 1) / group.size()
    collectives = 3 * len(units) * link.latency
    gathers = 2 * units[0].gathered_bytes
    plain = numbers * share * (gathers + link.scatter * units[0].reduced_bytes)
    costs = [Cost("none", plain, collectives)]
    clock = _Clock(group, units[0].device)
    for preset in _CANDIDATES:
        scheme = scheme_of(config, preset)
        assert scheme is not None
        weights, gradients = (c.wire_bytes(_NUMBERS) / _NUMBERS for c in (scheme.weights, scheme.gradients))
        wire = (weights if scheme.delta else 2 * weights) + gradients
        codecs = clock.gathers(scheme) + clock.sums(scheme.gradients, scheme.feedback)
        costs.append(Cost(preset, numbers * share * wire, collectives + numbers * codecs))
    return costs


def _replicate_costs(
    units: Sequence[Unit], config: CommConfig, numbers: int, group: dist.ProcessGroup, link: Link
) -> list[Cost]:
    """Costs of the sum over copies, of which each rank holds a shard, of FSDP2's all-reduce first."""
    share = (group.size() - 1) / group.size()
    mine = numbers / units[0].shard_group.size()
    costs = [Cost("none", 2 * mine * share * 4, len(units) * link.latency)]
    clock = _Clock(group, units[0].device)
    for preset in _CANDIDATES[:3]:
        scheme = scheme_of(config, preset)
        assert scheme is not None
        wire = 2 * scheme.gradients.wire_bytes(_NUMBERS) / _NUMBERS
        codecs = 2 * clock.sums(scheme.gradients, scheme.feedback)
        costs.append(Cost(preset, mine * share * wire, 2 * len(units) * link.latency + mine * codecs))
    return costs


class _Clock:
    """Seconds that codecs take for a parameter on this device, with all ranks at work."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        ranks = group.size()
        self.rows = torch.randn(ranks, _NUMBERS // ranks, device=device).bfloat16()
        self.weights = torch.empty_like(self.rows)

    def gathers(self, scheme: Scheme) -> float:
        """Of the gathers of a step: a shard is encoded, all shards are decoded, for both passes."""
        codec, row = scheme.weights, self.rows[:1].float()
        if isinstance(codec, Cast):
            return 0.0  # FSDP2 casts in any case
        payloads = self._payloads(codec, self.rows)

        def both() -> None:
            codec.encode(row, payloads[:1])
            codec.decode_sum(payloads[None], self.weights)

        def delta() -> None:
            codec.encode(row, payloads[:1], minus=self.rows[:1])
            codec.decode_add(payloads, self.weights)

        copy = 2 * self._seconds(lambda: self.weights.copy_(self.rows))
        return self._seconds(delta) + copy if scheme.delta else 2 * self._seconds(both)

    def sums(self, codec: Codec, feedback: str) -> float:
        """Of a sum: all rows are encoded, one row is decoded from each rank."""
        payloads = self._payloads(codec, self.rows)
        residual = None
        if isinstance(codec, Quantised) and feedback != "none":
            residual = codec.residual(len(self.rows), self.rows.shape[1], feedback, self.device)
        out = torch.empty(1, self.rows.shape[1], device=self.device)

        def run() -> None:
            codec.encode(self.rows, payloads, residual=residual)
            codec.decode_sum(payloads[:, None], out)

        return self._seconds(run)

    def _payloads(self, codec: Codec, rows: Tensor) -> Tensor:
        size = codec.wire_bytes(rows.shape[1])
        payloads = torch.empty(len(rows), size, dtype=torch.uint8, device=self.device)
        codec.encode(rows, payloads)
        return payloads

    def _seconds(self, call: Callable[[], object]) -> float:
        def run() -> None:
            call()

        return _agreed(run, self.group, self.device) / self.rows.numel()
