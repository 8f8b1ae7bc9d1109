"""The one place where parallelism is applied to a model, in its one right order.

attention -> norms and MLPs -> activation policy -> compile blocks -> fully_shard bottom-up -> collectives
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtrain.activations.policy import ActivationConfig, apply_activation_policy
from dtrain.activations.region import Outside
from dtrain.blocks import find_blocks
from dtrain.comm import CommConfig, attach
from dtrain.sharding.shard import ShardConfig, shard
from dtrain.swap.attention import AttentionConfig, swap_attention
from dtrain.swap.fusion import FusionConfig, swap_fused


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile of each block."""

    enabled: bool = field(
        default=False, metadata={"help": "Compile each block: one graph serves all blocks of a shape."}
    )
    dynamic: bool = field(
        default=False, metadata={"help": "Compile for symbolic sizes, where clips come in many shapes."}
    )


@dataclass(frozen=True)
class ParallelConfig:
    """All that `parallelize` applies; the tables of a run's config by the same names."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    comm: CommConfig = field(default_factory=CommConfig)


def compile_blocks(blocks: Sequence[nn.Module], config: CompileConfig) -> None:
    """Compile each block's `forward` in place; hooks (FSDP2's) stay outside the graph.

    So do a stash and a budget: what they call is compiled. Checkpointing itself is part of the graph.
    """
    if not config.enabled:
        return
    compiler = partial(torch.compile, dynamic=config.dynamic)
    for block in blocks:
        forward: Any = block.forward
        if isinstance(forward, Outside):
            forward.compile_inside(compiler)
        else:
            block.forward = compiler(forward)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    config: ParallelConfig | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> nn.Module:
    """Make any transformer train sharded over `mesh`. Works in place and returns the model.

    Args:
        model: on any device, also meta (then call `to_empty` and fill the parameters afterwards).
        mesh: one axis to shard over, or (replicate, shard).
        config: policies; all defaults when absent.
        blocks: the repeated blocks; found by structure when absent, see `find_blocks`.
    """
    config = config or ParallelConfig()
    blocks = find_blocks(model, blocks)
    if config.attention.swap:
        swap_attention(model, config.attention.backend)
    if config.fusion.swap:
        swap_fused(model, config.fusion.backend)
    apply_activation_policy(blocks, config.activations)
    compile_blocks(blocks, config.compile)
    shard(model, blocks, mesh, config.shard)
    attach(model, mesh, config.comm)
    return model
