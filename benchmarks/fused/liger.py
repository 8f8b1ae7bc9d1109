"""Functions of Liger-Kernel, where it is installed. Source: Hsu et al., arXiv 2410.10989."""

import importlib
from typing import Any

from torch import Tensor

from benchmarks.sweep.contest import Function, Rivals

__all__ = ["with_liger"]

LIGER = "Liger-Kernel"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    return _function("layer_norm", "LigerLayerNormFunction").apply(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Any:
    # Not in place: that writes over the gradient, which the next call is given again.
    return _function("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "llama", False)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Any:
    """The sum, and it normed."""
    function = _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    normed, total = function.apply(branch, x, weight, eps, 0.0, "llama", False)
    return total, normed


def with_liger(definition: Function, ours: Function, theirs: Function) -> Rivals:
    """Rivals of which Liger-Kernel's function is one, if it is installed."""
    try:
        importlib.import_module("liger_kernel")
    except ImportError as error:
        return Rivals(definition, ours, absent={LIGER: f"{type(error).__name__}: {error}"})
    return Rivals(definition, ours, others={LIGER: theirs})


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
