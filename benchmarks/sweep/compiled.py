"""torch.compile as a contestant: for the very shapes of a case, and never quietly eager."""

from typing import Any

import torch
from torch import nn

__all__ = ["compiled", "compiled_module"]


def compiled(function: Any) -> Any:
    """`function`, compiled when it is first called with tensors of new shapes."""
    _no_fallback()
    return torch.compile(function, dynamic=False)


def compiled_module(module: nn.Module) -> nn.Module:
    """The same module, compiled in place."""
    _no_fallback()
    module.compile(dynamic=False)
    return module


def _no_fallback() -> None:
    """Past the limit of recompilations, which a sweep would reach, a function is eager without a word."""
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
