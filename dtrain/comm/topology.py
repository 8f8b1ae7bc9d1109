"""Which ranks share a node, and the process groups of sums in two levels.

A sum over ranks of several nodes is formed in two hops: within each node first, over fast links, and then
between the ranks that hold the same place in their nodes, so that slow links carry the gradients of a node
once, not once a rank (SDP4Bit, arXiv 2410.15526, and ZeRO++, arXiv 2306.10209).
"""

import logging
import os
from dataclasses import dataclass

import torch.distributed as dist

log = logging.getLogger(__name__)

__all__ = ["Levels", "find_levels", "leaves_node", "node_size"]


@dataclass(frozen=True)
class Levels:
    """A group of ranks as nodes x places.

    Attributes:
        nodes: how many.
        places: ranks of each.
        inside: the ranks of this node, in order.
        between: the ranks of this place, in the order of nodes.
    """

    nodes: int
    places: int
    inside: dist.ProcessGroup
    between: dist.ProcessGroup


def node_size(configured: int) -> int:
    """Ranks on a machine: as configured, else as torchrun says, else all."""
    return configured or int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def leaves_node(group: dist.ProcessGroup, per_node: int) -> bool:
    """Whether the group has ranks of several nodes."""
    return len({rank // per_node for rank in dist.get_process_group_ranks(group)}) > 1


def find_levels(group: dist.ProcessGroup, per_node: int) -> Levels | None:
    """The two levels of a group; None where it has one.

    Every rank of the group calls it. Ranks are numbered node by node, as torchrun does.
    """
    nodes: dict[int, list[int]] = {}
    for rank in dist.get_process_group_ranks(group):
        nodes.setdefault(rank // per_node, []).append(rank)
    sizes = {len(ranks) for ranks in nodes.values()}
    if len(nodes) == 1 or sizes == {1}:
        return None
    if len(sizes) > 1 or sorted(r for ranks in nodes.values() for r in ranks) != [
        r for ranks in nodes.values() for r in ranks
    ]:
        log.warning(
            "comm: the %d ranks of a sum lie unevenly on %d nodes (%s): gradients are summed in one level.",
            group.size(), len(nodes), ", ".join(str(len(ranks)) for ranks in nodes.values()),
        )  # fmt: skip
        return None
    mine, me = dist.get_rank() // per_node, dist.get_rank()
    place = nodes[mine].index(me)
    return Levels(
        nodes=len(nodes),
        places=len(nodes[mine]),
        inside=_group(nodes[mine]),
        between=_group([ranks[place] for ranks in nodes.values()]),
    )


def alone() -> dist.ProcessGroup:
    """A group of this rank only."""
    return _group([dist.get_rank()])


def _group(ranks: list[int]) -> dist.ProcessGroup:
    # Only members take part: others of the world may be in another part of the mesh.
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
