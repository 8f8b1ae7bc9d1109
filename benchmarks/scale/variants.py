"""What is compared: FSDP2's own collectives and the presets of `dtrain.comm`, and what each sends for a unit.

Bytes are those of the codecs' messages, scales and padding included.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.scale import codecs
from benchmarks.scale.cluster import NOTHING, Cluster, Traffic, all_to_all, rings
from benchmarks.scale.codecs import Moved
from dtrain.comm.codec import Cast, Codec
from dtrain.comm.config import CommConfig, Preset, Scheme, scheme_of
from dtrain.comm.packing import Packing, Segment

__all__ = ["BASELINE", "Unit", "Variant", "variants"]

BASELINE = "fsdp2-bf16"
_PRESETS: tuple[Preset, ...] = ("bf16", "int8", "int8-int4", "int4-delta")


@dataclass(frozen=True)
class Variant:
    """A way to gather and to sum.

    Args:
        name: of the preset, or "fsdp2-" and the dtype of sums.
        scheme: codecs; None for FSDP2's own collectives.
        summed_in: by FSDP2.
        two_levels: gradients are summed within nodes first.
    """

    name: str
    scheme: Scheme | None = None
    summed_in: torch.dtype = torch.bfloat16
    two_levels: bool = False

    @property
    def levels(self) -> int:
        """0 for rings, which know none."""
        return 0 if self.scheme is None else 1 + self.two_levels


class Unit(NamedTuple):
    """What a rank does for the parameters that are gathered together, once a step each.

    Args:
        forward, backward: the gathers.
        reduce: collectives of the sum of gradients, one after another.
        codecs: bytes that codecs move in all three.
    """

    forward: Traffic
    backward: Traffic
    reduce: tuple[Traffic, ...]
    codecs: Moved

    @property
    def port_bytes(self) -> float:
        """Bytes through this GPU's port to the network."""
        return sum(t.port_bytes for t in (self.forward, self.backward, *self.reduce))


def variants() -> list[Variant]:
    """FSDP2 with sums in fp32 and bf16, then each preset in one level and in two."""
    plain = [Variant("fsdp2-fp32", summed_in=torch.float32), Variant(BASELINE)]
    schemes = [scheme_of(CommConfig(preset=preset), preset) for preset in _PRESETS]
    return plain + [Variant(s.preset, s, two_levels=t) for s in schemes if s for t in (False, True)]


def unit(variant: Variant, cluster: Cluster, numbers: int) -> Unit:
    """A unit of `numbers` parameters in all, of which none travels exactly."""
    n = -(-numbers // cluster.gpus)
    scheme = variant.scheme
    if scheme is None:
        gather = rings(cluster, _message(Cast(torch.bfloat16), n))
        return Unit(gather, gather, (rings(cluster, _message(Cast(variant.summed_in), n)),), Moved())
    gather = rings(cluster, _message(scheme.weights, n))
    two_levels = variant.two_levels and cluster.nodes > 1 and cluster.places > 1
    moved = codecs.gather_moved(scheme, cluster, n)
    again = codecs.kept_gather_moved(scheme, cluster, n) if scheme.delta else moved
    return Unit(
        forward=gather,
        backward=NOTHING if scheme.delta else gather,
        reduce=_sum(scheme, cluster, n, two_levels),
        codecs=moved + again + codecs.reduce_moved(scheme, cluster, n, two_levels),
    )


def _sum(scheme: Scheme, cluster: Cluster, n: int, two_levels: bool) -> tuple[Traffic, ...]:
    message = _message(scheme.gradients, n)
    if not two_levels:
        return (all_to_all(cluster, message),)
    first = all_to_all(cluster, cluster.nodes * _message(scheme.inside, n), between=False)
    return first, all_to_all(cluster, message, inside=False)


def _message(codec: Codec, n: int) -> int:
    return Packing([Segment(n, exact=False)], codec, torch.bfloat16).message_bytes
