"""When two calls of blocks are the same work: equal modules on equal inputs, but for the numbers in them.

So 37 equal blocks are measured once, and another video's shape is another kind.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["describe", "describe_module"]

_PLAIN = (int, float, str, bool, bytes, type(None))
_DEPTH = 6


def describe(value: Any, depth: int = _DEPTH) -> Hashable:
    """All of a value but the numbers in its tensors; of objects their attributes, down to a depth."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), str(value.dtype), str(value.device), value.requires_grad)
    if isinstance(value, _PLAIN):
        return value
    if not depth:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return tuple((str(key), describe(item, depth - 1)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(describe(item, depth - 1) for item in value)
    return (type(value).__qualname__, describe(getattr(value, "__dict__", {}), depth - 1))


def describe_module(module: nn.Module) -> Hashable:
    """What modules, parameters and plain attributes a module has."""
    parts = ((name, type(part).__qualname__, _attributes(part)) for name, part in module.named_modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (*parts, *((name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors))


def _attributes(module: nn.Module) -> Hashable:
    return tuple((key, item) for key, item in vars(module).items() if isinstance(item, _PLAIN))
