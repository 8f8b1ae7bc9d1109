"""MLPs of linear, GELU, linear in the forms that libraries give them, and the fused one in their place.

Known are PyTorch's `Sequential(Linear, GELU, Linear)`, diffusers' `FeedForward`, whose `net` begins with a
GELU that holds the first linear, and timm's form with `fc1`, `act` and `fc2`. Dropout may stand between.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from dtrain.kernels.gelu_linear import Approximate
from dtrain.kernels.mlp import mlp
from dtrain.kernels.serving import Backend
from dtrain.swap.deferred import DeferredNorm, computed

__all__ = ["MlpLayers", "forward_of", "layers_of", "refusal"]


class MlpLayers(NamedTuple):
    """What an MLP computes with, in order."""

    first: nn.Module
    activation: nn.Module
    second: nn.Module
    others: tuple[nn.Module, ...]
    """What stands between or behind."""


def layers_of(module: nn.Module) -> MlpLayers | None:
    """The layers of a module that has one of the forms, whatever kind of layer they are; None for others."""
    net = getattr(module, "net", None)
    if type(module).__name__ == "FeedForward" and isinstance(net, nn.ModuleList) and len(net) > 2:
        projection = getattr(net[0], "proj", None)
        return MlpLayers(projection, net[0], net[2], (net[1], *net[3:])) if projection is not None else None
    children = dict(module.named_children())
    if {"fc1", "act", "fc2"} <= children.keys():
        fc1, act, fc2 = (children.pop(name) for name in ("fc1", "act", "fc2"))
        return MlpLayers(fc1, act, fc2, tuple(children.values()))
    if type(module) is nn.Sequential and isinstance(next(iter(module), None), nn.Linear):
        first, *rest = (layer for layer in module if not isinstance(layer, nn.Dropout))
        if len(rest) == 2 and isinstance(rest[0], nn.GELU):
            dropouts = tuple(layer for layer in module if isinstance(layer, nn.Dropout))
            return MlpLayers(first, rest[0], rest[1], dropouts)
    return None


def refusal(layers: MlpLayers) -> str:
    """Why the fused MLP cannot stand for these layers; empty when it can."""
    if type(layers.activation).__name__ != "GELU" or not hasattr(layers.activation, "approximate"):
        return f"its activation is {type(layers.activation).__name__}, not GELU"
    for layer in (layers.first, layers.second):
        if type(layer) is not nn.Linear:
            return f"{type(layer).__name__} is no plain nn.Linear"
    if layers.first.out_features != layers.second.in_features:
        return "its second linear does not take what the first gives"
    for layer in layers.others:
        if isinstance(layer, nn.Dropout) and layer.p > 0:
            return f"dropout with p = {layer.p}"
        if not isinstance(layer, nn.Dropout | nn.Identity):
            return f"{type(layer).__name__} stands between its layers"
    return ""


@functools.cache
def forward_of(backend: Backend) -> Callable[..., Tensor]:
    """A `forward` for MLPs; one function for all of them, so that one graph serves them all.

    The module's `chunks` says in how many pieces, see `kernels.mlp`.
    """

    def forward(module: Any, x: Tensor | DeferredNorm, *_: Any, **__: Any) -> Tensor:
        layers = layers_of(module)
        assert layers is not None
        first, second = layers.first, layers.second
        approximate: Approximate = layers.activation.approximate  # type: ignore[assignment]
        return mlp(
            computed(x), first.weight, first.bias, second.weight, second.bias,  # type: ignore[arg-type]
            approximate=approximate, chunks=module.chunks, backend=backend,
        )  # fmt: skip

    return forward
