"""A module's `forward` replaced for this one instance, and known to be ours afterwards."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["is_replaced", "is_swapped", "set_forward"]


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` run `forward(module, ...)`; a module that is copied takes it along."""
    forward.swapped = True  # type: ignore[attr-defined]
    module.forward = MethodType(forward, module)


def is_swapped(module: nn.Module) -> bool:
    """Whether `set_forward` was here."""
    return getattr(vars(module).get("forward"), "swapped", False) is True


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody else replaced its forward: activation checkpointing, torch.compile."""
    return "forward" in vars(module) and not is_swapped(module)
