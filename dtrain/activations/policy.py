"""Activation policies: what a block keeps for its backward pass.

`none` keeps everything; `full` keeps the block's inputs and recomputes the rest (Chen et al., 2016,
https://arxiv.org/abs/1604.06174). The block's `forward` is wrapped in place, so parameter names stay as they
are and FSDP2's hooks, which run outside `forward`, gather a block's parameters once for recomputation and
gradient together. Apart from that, MLPs may be computed in pieces.
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
    mlp_chunks: int = field(
        default=1,
        metadata={
            "help": "Compute every MLP in this many pieces of its rows and keep its input only: bounds the "
            "memory of the hidden layer, for a sixth more FLOPs of the MLP. 1: in one."
        },
    )

    def __post_init__(self) -> None:
        if self.mlp_chunks < 1:
            raise ValueError(f"activations.mlp_chunks = {self.mlp_chunks}: must be 1 or more.")


def apply_activation_policy(blocks: Sequence[nn.Module], config: ActivationConfig) -> None:
    """Set the policy on each block, in place. Apply before compiling and sharding.

    Raises:
        ValueError: MLPs are to be computed in pieces, and there is none that can be.
    """
    if config.mlp_chunks > 1:
        _chunk_mlps(blocks, config.mlp_chunks)
    if config.policy == "none":
        return
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _chunk_mlps(blocks: Sequence[nn.Module], chunks: int) -> None:
    modules = (module for block in blocks for module in block.modules())
    mlps = [module for module in modules if isinstance(getattr(module, "chunks", None), int)]
    if not mlps:
        raise ValueError(
            f"activations.mlp_chunks = {chunks}: no block has an MLP of linear, GELU, linear that dtrain "
            "computes; fusion.swap = true lets it, or use 1."
        )
    for module in mlps:
        module.chunks = chunks  # type: ignore[assignment]
