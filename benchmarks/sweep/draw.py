"""Random inputs that repeat, made on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.sweep.plan import Settings

__all__ = ["draws"]


def draws(settings: Settings, seed: int = 0) -> Callable[..., Tensor]:
    """A function from sizes to a normal tensor in the settings' dtype, another one at every call."""
    generator = torch.Generator(settings.device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=settings.device).to(settings.dtype)

    return draw
