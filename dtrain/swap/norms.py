"""Norms in the forms that libraries give them, and the fused one in their place.

Known are PyTorch's LayerNorm and RMSNorm and diffusers' FP32LayerNorm and RMSNorm, over the last dim. Those
that a DiT scales and shifts next, which have no weights or are part of a module made for that, give a
`DeferredNorm`. A norm whose result may leave a block does not: FSDP2 looks for tensors there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.kernels.norm import norm
from dtrain.kernels.norm_reference import Kind
from dtrain.kernels.serving import Backend
from dtrain.swap.deferred import DeferredNorm, computed

__all__ = ["forward_of", "is_modulated", "is_norm", "refusal"]


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of the known ones, or a subclass of PyTorch's that may do something else."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or _is_diffusers_rms(module)


def refusal(module: Any) -> str:
    """Why the fused norm cannot stand for a norm; empty when it can."""
    known = type(module) in (nn.LayerNorm, nn.RMSNorm) or _is_diffusers_rms(module)
    if not known and type(module).__name__ != "FP32LayerNorm":
        return f"{type(module).__name__} may do more than the norm that it is made from"
    shape = tuple(getattr(module, "normalized_shape", None) or module.dim)
    return "" if len(shape) == 1 else f"it norms over {len(shape)} dims"


def _is_diffusers_rms(module: nn.Module) -> bool:
    return type(module).__name__ == "RMSNorm" and type(module).__module__.startswith("diffusers.")


def is_modulated(module: Any, owner: nn.Module) -> bool:
    """Whether its owner is sure to scale and shift what it gives, or to use it up otherwise."""
    adaptive = any(word in type(owner).__name__ for word in ("AdaLayerNorm", "LayerNormZero", "RMSNormZero"))
    return adaptive or (module.weight is None and getattr(module, "bias", None) is None)


@functools.cache
def forward_of(backend: Backend, modulated: bool) -> Callable[..., Any]:
    """A `forward` for norms; one function for all of a kind, so that one graph serves them all."""

    def forward(module: Any, x: Tensor | DeferredNorm) -> Tensor | DeferredNorm:
        x = computed(x)
        weight, bias = module.weight, getattr(module, "bias", None)
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        kind: Kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"

        def compute(scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
            return norm(
                x, weight, bias, kind=kind, eps=eps, scale=scale, shift=shift, dtype=dtype, backend=backend
            )

        dtype = _result(module, x)
        if modulated and x.dim() == 3:
            return DeferredNorm(compute, x, dtype)
        return compute(None, None, dtype)

    return forward


def _result(module: Any, x: Tensor) -> torch.dtype:
    """The dtype that the module itself gives."""
    if _is_diffusers_rms(module):
        return x.dtype if module.weight is None else module.weight.dtype
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.float32 if autocast and type(module).__name__ != "FP32LayerNorm" else x.dtype
