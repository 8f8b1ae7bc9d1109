"""A recipe's model as a run trains it: built without memory, converted, and parallelized over a mesh."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtrain.config import RunConfig
from dtrain.parallelize import ParallelConfig, parallelize
from dtrain.recipe import Recipe
from dtrain.sharding.precision import convert_weights

__all__ = ["build_sharded"]


def build_sharded(recipe: Recipe, config: RunConfig, mesh: DeviceMesh) -> nn.Module:
    """The sharded model, its parameters on the meta device: `to_empty` gives them memory."""
    with torch.device("meta"):
        model = recipe.build()
    convert_weights(model, config.optim.weights)
    parallel = ParallelConfig(
        config.attention, config.fusion, config.activations, config.compile, config.shard, config.comm
    )
    return parallelize(model, mesh, parallel, recipe.blocks(model) if recipe.blocks else None)
