"""Swap a model's norms and MLPs for the fused ones, in place; its own code runs as it was.

1. Modules made for this, with a `fused_backend` attribute: it is set.
2. Norms, PyTorch's and diffusers', see `norms`: one pass each way. Those of DiTs take in the scale and shift
   that follow, see `deferred`.
3. MLPs of linear, GELU, linear, see `mlps`: for the backward pass they keep the product before GELU only.

What looks like one of these and is none is left and listed. Hooks on layers inside a swapped MLP do not run.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dtrain.kernels.serving import Backend
from dtrain.swap import mlps, norms
from dtrain.swap.forward import is_replaced, set_forward
from dtrain.swap.report import Swap

__all__ = ["FusionConfig", "swap_fused"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusionConfig:
    """Who computes the model's norms and MLPs."""

    swap: bool = field(
        default=True,
        metadata={
            "help": "Let every norm and MLP that is recognised, diffusers' and timm's too, be dtrain's fused "
            "one; false: leave the model's own."
        },
    )
    backend: Backend = field(
        default="auto",
        metadata={
            "help": "Who serves: triton is dtrain's kernels, reference is PyTorch's; auto is triton on a GPU."
        },
    )

    def __post_init__(self) -> None:
        if not self.swap and self.backend != "auto":
            raise ValueError(
                f"backend = {self.backend}: without effect while swap = false; swap = true, or auto."
            )


def swap_fused(model: nn.Module, backend: Backend = "auto") -> Swap:
    """Let a model's norms and MLPs be dtrain's fused ones. Works in place, also on meta.

    Apply before activation policy, compile and sharding. Names of parameters stay as they are, and a second
    call changes the backend.

    Args:
        model: any module.
        backend: as `kernels.norm.norm` takes it.

    Returns: what was swapped and what was left, and why; also logged.
    """
    done = Swap()
    inside: set[nn.Module] = set()  # of a swapped MLP, whose layers no longer run themselves
    for name, module in model.named_modules():
        if module in inside:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        swapped, reason = _swap(module, owner, backend)
        if reason:
            done.left[name] = reason
        elif swapped:
            done.swapped[name] = type(module).__name__
            inside.update(module.modules())
    log.log(logging.WARNING if done.left else logging.INFO, "norms and MLPs: %s", done)
    return done


def _swap(module: Any, owner: nn.Module, backend: Backend) -> tuple[bool, str]:
    """Whether a module was swapped, or why not although it looks like one that could be."""
    if isinstance(getattr(module, "fused_backend", None), str):
        module.fused_backend = backend
        return True, ""
    layers = mlps.layers_of(module)
    if layers is None and not norms.is_norm(module):
        return False, ""
    if is_replaced(module):
        return False, "its forward was replaced before: swap norms and MLPs first"
    reason = norms.refusal(module) if layers is None else mlps.refusal(layers)
    if reason:
        return False, reason
    if layers is None:
        set_forward(module, norms.forward_of(backend, norms.is_modulated(module, owner)))
    else:
        set_forward(module, mlps.forward_of(backend))
        module.chunks = getattr(module, "chunks", 1)
    return True, ""
