"""How long collectives take on nodes of several GPUs, by their bytes.

W ranks lie on nodes of P, with fast links inside a node and one port to the network for each GPU. Each rank
has a message of m bytes; bytes that a GPU sends, by port and by link:

    rings (NCCL's all-gather, reduce-scatter)   port (W - P)·m / P    link (W - 1)·m
    all-to-all                                  port (W - P)·m        link (P - 1)·m

NCCL lays as many rings as a node has ports, and each enters a node once; an all-to-all carries every rank's
own message to every other rank. So on nodes of P a sum by all-to-all in one level pays its ports P times what
rings pay, and in two levels (within nodes, then between them) what rings pay.
Source of the rings: NVIDIA, "nccl-tests", doc/PERFORMANCE.md, on bus bandwidth.
"""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NOTHING", "Cluster", "Traffic", "all_to_all", "rings"]


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Args:
        gpus: W, one rank each.
        per_node: P; where W is less, one node has them all.
        port_rate: bytes a second that a GPU's port to the network sends.
        link_rate: bytes a second that a GPU sends within its node.
        collective_s: seconds of a collective besides its bytes: its launch, and ranks that wait for others.
        port_hop_s, link_hop_s: seconds of each hop of a ring between nodes, and within one.
        message_s: seconds of each message of an all-to-all that leaves the node.
    Raises:
        ValueError: a number that is not positive, or nodes that are not full.
    """

    gpus: int
    per_node: int = 8
    port_rate: float = 12.5e9
    link_rate: float = 350e9
    collective_s: float = 15e-6
    port_hop_s: float = 5e-6
    link_hop_s: float = 1e-6
    message_s: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("gpus", "per_node", "port_rate", "link_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"gpus = {self.gpus}: must be a multiple of per_node = {self.per_node}, or fewer"
            )

    @property
    def places(self) -> int:
        """Ranks of a node."""
        return min(self.gpus, self.per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.places

    def seconds(self, traffic: "Traffic") -> float:
        """Ports and links work at the same time."""
        return traffic.latency_s + max(
            traffic.port_bytes / self.port_rate, traffic.link_bytes / self.link_rate
        )


class Traffic(NamedTuple):
    """What a GPU sends in one collective through its port and its link, and seconds besides."""

    port_bytes: float
    link_bytes: float
    latency_s: float


NOTHING = Traffic(0.0, 0.0, 0.0)


def rings(cluster: Cluster, message: int) -> Traffic:
    """An all-gather or a reduce-scatter of `message` bytes a rank, over all ranks."""
    w, p, n = cluster.gpus, cluster.places, cluster.nodes
    if w == 1:
        return NOTHING
    hops = (n - 1) * cluster.port_hop_s + (w - n) * cluster.link_hop_s
    return Traffic((w - p) * message / p, (w - 1) * message, cluster.collective_s + hops)


def all_to_all(cluster: Cluster, message: int, inside: bool = True, between: bool = True) -> Traffic:
    """Every rank sends each other one `message` bytes.

    Args:
        inside, between: among all ranks if both; the ranks of each node; those of one place in every node.
    """
    w, p, n = cluster.gpus, cluster.places, cluster.nodes
    near = p - 1 if inside else 0
    far = (w - p if inside else n - 1) if between else 0
    if not near + far:
        return NOTHING
    hop = cluster.port_hop_s if far else cluster.link_hop_s
    return Traffic(far * message, near * message, cluster.collective_s + hop + far * cluster.message_s)
