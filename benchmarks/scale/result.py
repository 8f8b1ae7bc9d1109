"""The file of a modelled run. Nothing in it was measured, unless it says so of the codecs' rates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.record import Origin
from benchmarks.scale.cluster import Cluster
from benchmarks.scale.codecs import CodecRates
from benchmarks.scale.step import StepTime, Workload, step_time
from benchmarks.scale.variants import BASELINE, Variant, variants

__all__ = ["SCHEMA_VERSION", "Point", "ScaleModel", "points"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One variant on one cluster."""

    variant: str = field(metadata={"help": "of FSDP2 alone, or the preset"})
    levels: int = field(metadata={"help": "in which gradients are summed; 0: by rings, which know none"})
    gpus: int = field(metadata={"help": "ranks"})
    gbit: float = field(metadata={"help": "Gbit/s of each GPU's port to other nodes"})
    step_ms: float = field(metadata={"help": "modelled time of a step"})
    compute_ms: float = field(metadata={"help": "forward and backward"})
    codec_ms: float = field(metadata={"help": "of codecs, none of which counts as hidden"})
    wire_ms: float = field(metadata={"help": "of all collectives, hidden or not"})
    exposed_ms: float = field(metadata={"help": "of them, what compute does not hide"})
    port_bytes: float = field(metadata={"help": "that a GPU sends to other nodes in a step"})
    gain: float = field(metadata={"help": f"step of {BASELINE} over this one's; over 1 is faster"})


@dataclass(frozen=True, kw_only=True)
class ScaleModel(Origin):
    """All points, and what they assume."""

    kind: Literal["model"] = field(metadata={"help": "never measured: computed from the assumptions"})
    schema_version: int = field(metadata={"help": "version of this format"})
    baseline: str = field(metadata={"help": "the variant that gains are over"})
    assumptions: tuple[str, ...] = field(metadata={"help": "all of them, for people"})
    points: tuple[Point, ...] = field(metadata={"help": "by rate, GPUs and variant"})


def points(workload: Workload, clusters: Sequence[Cluster], rates: CodecRates) -> list[Point]:
    """Every variant on every cluster; in two levels where a cluster has them."""
    return [point for cluster in clusters for point in _of_cluster(workload, cluster, rates)]


def _of_cluster(workload: Workload, cluster: Cluster, rates: CodecRates) -> list[Point]:
    has_levels = cluster.nodes > 1 and cluster.places > 1
    chosen = [v for v in variants() if has_levels or not v.two_levels]
    times = {v: step_time(v, workload, cluster, rates) for v in chosen}
    base = next(time.step for v, time in times.items() if v.name == BASELINE)
    return [_point(v, cluster, time, base) for v, time in times.items()]


def _point(variant: Variant, cluster: Cluster, time: StepTime, base: float) -> Point:
    return Point(
        variant=variant.name,
        levels=variant.levels,
        gpus=cluster.gpus,
        gbit=cluster.port_rate * 8e-9,
        step_ms=1e3 * time.step,
        compute_ms=1e3 * time.compute,
        codec_ms=1e3 * time.codecs,
        wire_ms=1e3 * time.wire,
        exposed_ms=1e3 * time.exposed,
        port_bytes=time.port_bytes,
        gain=base / time.step,
    )
