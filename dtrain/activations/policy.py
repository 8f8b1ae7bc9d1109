"""Activation policies: what a block keeps for its backward pass, and where.

`none` keeps everything; `full` keeps the block's inputs and recomputes the rest (Chen et al., 2016,
https://arxiv.org/abs/1604.06174); `selective` keeps what some operators return as well; `budget` chooses for
each block, so that what all keep fits. The inputs may wait elsewhere, see `stash`. A block's `forward` is
replaced, so parameter names stay as they are and FSDP2's hooks, which run outside `forward`, gather a block's
parameters once for recomputation and gradient together. Apart from that, MLPs may be computed in pieces.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import nn

from dtrain.activations.budget import Budget, Budgeted
from dtrain.activations.host import HostStore
from dtrain.activations.meter import StashMeter
from dtrain.activations.region import Contexts, Forward, Region
from dtrain.activations.selective import check_names, name_contexts, watch
from dtrain.activations.stash import QuantisedStore, Stash, Stashed, Store
from dtrain.kernels.payload import Format

__all__ = ["ActivationConfig", "apply_activation_policy", "stash_meter"]

_owners = itertools.count()


@dataclass(frozen=True)
class ActivationConfig:
    """What each block keeps for its backward pass."""

    policy: Literal["none", "full", "selective", "budget"] = field(
        default="none",
        metadata={
            "help": "none: keep all activations (fastest). full: keep block inputs, recompute the rest "
            "(about a third more FLOPs, least memory). selective: full, but keep what the operators of save "
            "return. budget: keep what saves the most FLOPs within budget_gib."
        },
    )
    mlp_chunks: int = field(
        default=1,
        metadata={
            "help": "Compute every MLP in this many pieces of its rows and keep its input only: bounds the "
            "memory of the hidden layer, for a sixth more FLOPs of the MLP. 1: in one."
        },
    )
    save: tuple[str, ...] = field(
        default=("attention",),
        metadata={
            "help": 'For selective: groups of operators, "attention" and "linear", or globs over their names '
            'such as "aten::*mm*".'
        },
    )
    budget_gib: float = field(
        default=0.0,
        metadata={
            "help": "For budget: GiB that all blocks of a rank may keep between forward and backward beyond "
            "their inputs."
        },
    )
    stash: Literal["device", "host", "int8", "fp8"] = field(
        default="device",
        metadata={
            "help": "Where block inputs that checkpointing keeps wait for the backward pass. device: where "
            "they are. host: in pinned memory, copied beside compute. int8, fp8: in half of bf16's bytes, "
            "rounded."
        },
    )
    stash_blocks: int = field(
        default=0,
        metadata={"help": "Stash the inputs of this many of the first blocks, which wait longest; 0: all."},
    )
    stash_smallest: int = field(
        default=2**16,
        metadata={
            "help": "Inputs of fewer elements stay on the device, where they cost less than the host's time "
            "to put them away; 1: none do."
        },
    )
    stash_limit_gib: float = field(
        default=1.0,
        metadata={"help": "For host: GiB on the device whose copies are under way before compute waits."},
    )

    def __post_init__(self) -> None:
        if self.mlp_chunks < 1:
            raise ValueError(f"activations.mlp_chunks = {self.mlp_chunks}: must be 1 or more.")
        check_names(self.save)
        if self.policy == "selective" and not self.save:
            raise ValueError("activations.save = []: selective needs names; policy = 'full' keeps nothing.")
        if self.policy == "budget" and not self.budget_gib > 0:
            raise ValueError(
                f"activations.budget_gib = {self.budget_gib}: policy = 'budget' needs a number above 0; "
                "policy = 'full' keeps the least."
            )
        self._check_stash()

    def _check_stash(self) -> None:
        if self.stash != "device" and self.policy == "none":
            raise ValueError(
                f"activations.stash = {self.stash!r}: policy = 'none' keeps more than block inputs, and all "
                "of it on the device; use policy = 'full', 'selective' or 'budget', or stash = 'device'."
            )
        if self.stash_blocks < 0:
            raise ValueError(f"activations.stash_blocks = {self.stash_blocks}: must be 0 (all) or more.")
        if self.stash_smallest < 1:
            raise ValueError(f"activations.stash_smallest = {self.stash_smallest}: must be 1 (all) or more.")
        if not self.stash_limit_gib > 0:
            raise ValueError(f"activations.stash_limit_gib = {self.stash_limit_gib}: must be above 0.")


def apply_activation_policy(blocks: Sequence[nn.Module], config: ActivationConfig) -> None:
    """Set the policy on each block, in place. Apply before compiling (`compile_blocks`) and sharding.

    Args:
        blocks: in the order in which they run.
    Raises:
        ValueError: MLPs are to be computed in pieces, and there is none that can be; or the inputs of more
            blocks are to be stashed than there are.
    """
    if config.mlp_chunks > 1:
        _chunk_mlps(blocks, config.mlp_chunks)
    if config.policy == "none":
        return
    if config.stash_blocks > len(blocks):
        raise ValueError(
            f"activations.stash_blocks = {config.stash_blocks}: the model has {len(blocks)} blocks; 0 is all."
        )
    stash, owner = _stash(config), next(_owners)
    budget = Budget(int(config.budget_gib * 2**30)) if config.policy == "budget" else None
    contexts = partial(name_contexts, config.save, owner) if config.policy == "selective" else None
    for number, block in enumerate(blocks):
        if budget is not None:
            block.forward = Budgeted(block, number, budget, stash, owner)
        else:
            block.forward = _region(block.forward, contexts, stash, number)
    if contexts is not None:
        watch(blocks, config.save, owner)


def _region(forward: Forward, contexts: Contexts | None, stash: Stash | None, number: int) -> Forward:
    region = Region(forward, contexts)
    return region if stash is None else Stashed(region, stash, number)


def _stash(config: ActivationConfig) -> Stash | None:
    if config.stash == "device":
        return None
    meter = StashMeter()
    store: Store = (
        HostStore(int(config.stash_limit_gib * 2**30), meter)
        if config.stash == "host"
        else QuantisedStore(Format(config.stash), meter)
    )
    return Stash(store, meter, config.stash_blocks, config.stash_smallest)


def stash_meter(model: nn.Module) -> StashMeter | None:
    """The meter of what a model's blocks put away; None where inputs stay on the device."""
    for module in model.modules():
        stash = getattr(vars(module).get("forward"), "stash", None)
        if isinstance(stash, Stash):
            return stash.meter
    return None


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
