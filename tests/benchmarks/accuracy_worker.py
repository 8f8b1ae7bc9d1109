"""Run under torchrun: weights that all ranks share, then a bit that one of them has flipped."""

import json
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.accuracy.replicas import decoded_weights, equal_on_all_ranks, relative_error
from benchmarks.accuracy.settings import Settings
from dtrain.dist import process_group
from dtrain.sharding.mesh import MeshConfig, build_mesh
from uvit.clips import collate
from uvit.shapes import Shapes


def main(out: str) -> None:
    settings = Settings(ranks=2, batch=2)
    recipe = settings.recipe()
    with process_group(60) as world:
        torch.manual_seed(0)
        model: nn.Module = recipe.build()
        fully_shard(model, mesh=build_mesh(MeshConfig(), world.size, "cpu"), reshard_after_forward=True)
        weights = decoded_weights(model, recipe, collate([Shapes(settings.data, 0)[world.rank]]), seed=0)
        same, error = equal_on_all_ranks(weights), relative_error(weights, model)
        if world.rank == 1:
            weights["norm.bias"].view(torch.int32)[3] ^= 1
        found = {"same": same, "one_bit": equal_on_all_ranks(weights), "error": error}
        if world.is_main:
            with open(out, "w") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
