"""Activation policies: what a block keeps for its backward pass.

`none` keeps everything; `full` keeps the block's inputs and recomputes the rest (Chen et al., 2016,
https://arxiv.org/abs/1604.06174). The block's `forward` is wrapped in place, so parameter names stay as they
are and FSDP2's hooks, which run outside `forward`, gather a block's parameters once for recomputation and
gradient together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ActivationConfig:
    """What each block keeps for its backward pass."""

    policy: Literal["none", "full"] = field(
        default="none",
        metadata={
            "help": "none: keep all activations (fastest). full: keep block inputs, recompute the rest "
            "(about a third more FLOPs, least memory)."
        },
    )


def apply_activation_policy(blocks: Sequence[nn.Module], config: ActivationConfig) -> None:
    """Set the policy on each block, in place. Apply before compiling and sharding."""
    if config.policy == "none":
        return
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
