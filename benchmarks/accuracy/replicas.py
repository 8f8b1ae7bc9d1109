"""Do all ranks compute with the same weights? As each decodes them, compared bit for bit.

Ranks that disagree train different models whose gradients are averaged: the loss shows it late or never.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.accuracy.held_out import whole
from dtrain.recipe import Batch, Recipe
from dtrain.rng import SampleRNG

__all__ = ["decoded_weights", "equal_on_all_ranks", "relative_error"]


def decoded_weights(model: nn.Module, recipe: Recipe, batch: Batch, seed: int) -> dict[str, Tensor]:
    """The weights that a training step's forward computes with on this rank, whole.

    Runs a forward and a backward; every rank calls it.
    """
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, _args: object) -> None:
        for name, parameter in module.named_parameters():
            if not isinstance(parameter, DTensor):
                seen[name] = parameter.detach().clone()

    handle = model.register_forward_pre_hook(note)  # behind FSDP2's, which gathers
    recipe.loss(model, batch, SampleRNG(seed, batch["index"])).backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    return seen


def equal_on_all_ranks(weights: dict[str, Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1


def relative_error(weights: dict[str, Tensor], model: nn.Module) -> float:
    """|decoded - masters| / |masters| over all parameters: zero without compression, and never with it."""
    masters = whole({name: p.detach() for name, p in model.named_parameters()})
    difference = torch.stack([(weights[name] - p).norm() for name, p in masters.items()]).norm()
    return float(difference / torch.stack([p.norm() for p in masters.values()]).norm())
