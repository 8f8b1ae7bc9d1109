"""`preset = "auto"`: what pays on these links, measured at the start.

On each mesh axis, within nodes and between them, the seconds that each collective takes for a byte, and on
this device the seconds that each codec takes for a number, are measured by all ranks at once: a host that
ranks share is shared then too. The time that communication takes in a step is then, for N parameters,

    t(preset) = N · bytes / rate + N · codecs + collectives · latency

as if nothing were hidden behind compute: what is saved on the wire may be hidden already, what codecs take is
not. So a preset must win by more than a margin, and by more than its own codecs take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from dtrain.comm.codec import Cast, Codec
from dtrain.comm.config import CommConfig, Preset, Scheme, scheme_of
from dtrain.comm.fsdp import Unit
from dtrain.comm.measure import CodecClock, Link, measure_exchange, measure_link
from dtrain.comm.topology import Levels

__all__ = ["Choice", "Cost", "choose", "crossing", "pick"]

MARGIN = 0.05  # of the time without compression, that a preset must save
_CANDIDATES: tuple[Preset, ...] = ("bf16", "int8", "int8-int4", "int4-delta")


class _Hop(NamedTuple):
    """One exchange of a sum: the part of all gradients that a rank sends, and seconds a byte."""

    inside: bool
    part: float
    exchange: float


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


def choose(units: Sequence[Unit], config: CommConfig, levels: Levels | None) -> Choice:
    """Measure links and codecs, and choose for each axis. Every rank calls it; all choose alike.

    Args:
        units: of the model.
        config: of what is to be chosen.
        levels: in which gradients are summed over the shard axis; None where it is one.
    """
    first = units[0]
    numbers = sum(sum(unit.numels) for unit in units) * first.shard_group.size()
    shard, said = _choose_axis("shard", units, config, numbers, levels)
    copies = first.replicate_group
    if copies is None or copies.size() == 1:
        return Choice(scheme_of(config, shard), said)
    replicate, more = _choose_axis("replicate", units, config, numbers, None)
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
    axis: str, units: Sequence[Unit], config: CommConfig, numbers: int, levels: Levels | None
) -> tuple[Preset, list[str]]:
    unit = units[0]
    group = unit.shard_group if axis == "shard" else unit.replicate_group
    assert group is not None
    if group.size() == 1:
        return "none", [f"auto: the {axis} axis has one rank, so nothing travels on it"]
    link = measure_link(group, unit.device)
    if axis == "shard":
        hops = _hops(group, levels, link, unit.device)
        costs = _axis_costs(units, config, numbers, group, link, hops)
    else:
        hops = []
        costs = _replicate_costs(units, config, numbers, group, link)
    best = pick(costs, link.rate)
    return best.preset, _explain(axis, costs, best, link, group, hops)


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


def _explain(
    axis: str, costs: Sequence[Cost], best: Cost, link: Link, group: dist.ProcessGroup, hops: Sequence[_Hop]
) -> list[str]:
    table = ", ".join(f"{cost.preset} {1e3 * cost.at(link.rate):.0f} ms" for cost in costs)
    change = crossing(costs, best)
    until = f"; from {_gbit(change[0])} on {change[1]} would be" if change else "; no rate would change that"
    exchanges = [
        f", all-to-alls {_gbit(1 / hop.exchange)} {'within' if hop.inside else 'between'} nodes"
        for hop in hops
        if len(hops) > 1
    ]
    return [
        f"auto: the {axis} axis moves {_gbit(link.rate)} a rank among {group.size()}{''.join(exchanges)}, "
        f"{1e6 * link.latency:.0f} us a collective; communication of a step, nothing hidden: {table}",
        f"auto: takes {best.preset} there{until}",
    ]


def _gbit(rate: float) -> str:
    return f"{rate * 8e-9:.3g} Gbit/s"


def _hops(group: dist.ProcessGroup, levels: Levels | None, link: Link, device: torch.device) -> list[_Hop]:
    """The exchanges of a sum over the shard axis."""
    if levels is None:
        return [_Hop(False, (group.size() - 1) / group.size(), link.exchange)]
    inside, between = (measure_exchange(hop, device) for hop in (levels.inside, levels.between))
    nodes, places = levels.nodes, levels.places
    return [
        _Hop(True, (places - 1) / places, inside),
        _Hop(False, (nodes - 1) / nodes / places, between),
    ]


def _axis_costs(
    units: Sequence[Unit],
    config: CommConfig,
    numbers: int,
    group: dist.ProcessGroup,
    link: Link,
    hops: Sequence[_Hop],
) -> list[Cost]:
    """Costs of the shard axis, of FSDP2's own collectives first.

    Bytes are those of all-gathers that would take as long; within nodes time does not follow the rate.
    """
    share = (group.size() - 1) / group.size()
    latency = len(units) * link.latency
    scatter = units[0].reduced_bytes * link.scatter * link.rate
    plain = numbers * share * (2 * units[0].gathered_bytes + scatter)
    costs = [Cost("none", plain, 3 * latency)]
    clock = CodecClock(group, units[0].device)
    for preset in _CANDIDATES:
        scheme = scheme_of(config, preset)
        assert scheme is not None
        gathers = (1 if scheme.delta else 2) * _bytes_a_number(scheme.weights)
        wire, seconds = numbers * share * gathers, (2 + len(hops)) * latency
        seconds += numbers * clock.gathers(scheme)
        of_node = 1.0  # of the gradients that a rank begins with
        for hop in hops:
            codec = scheme.inside if hop.inside else scheme.gradients
            taken = numbers * hop.part * _bytes_a_number(codec) * hop.exchange
            seconds += numbers * of_node * clock.sums(codec, "none" if hop.inside else scheme.feedback)
            if hop.inside:
                seconds += taken
                of_node -= hop.part
            else:
                wire += taken * link.rate
        costs.append(Cost(preset, wire, seconds))
    return costs


def _bytes_a_number(codec: Codec) -> float:
    return codec.wire_bytes(2**20) / 2**20


def _replicate_costs(
    units: Sequence[Unit], config: CommConfig, numbers: int, group: dist.ProcessGroup, link: Link
) -> list[Cost]:
    """Costs of the sum over copies, of which each rank holds a shard, of FSDP2's all-reduce first.

    That one is a reduce-scatter and an all-gather; ours an all-to-all and an all-gather.
    """
    share = (group.size() - 1) / group.size()
    mine = numbers / units[0].shard_group.size()
    costs = [Cost("none", mine * share * 4 * (1 + link.scatter * link.rate), len(units) * link.latency)]
    clock = CodecClock(group, units[0].device)
    for preset in _CANDIDATES[:3]:
        scheme = scheme_of(config, preset)
        assert scheme is not None
        wire = _bytes_a_number(scheme.gradients) * (1 + link.exchange * link.rate)
        codecs = 2 * clock.sums(scheme.gradients, scheme.feedback)
        costs.append(Cost(preset, mine * share * wire, 2 * len(units) * link.latency + mine * codecs))
    return costs
