"""The hidden layer of an MLP in eager PyTorch: the ground truth of the tests, see `kernels.mlp`."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu_linear", "mlp", "with_bias"]


def with_bias(pre: Tensor, bias: Tensor | None) -> Tensor:
    """pre + bias in fp32 or better; without a bias pre as it is."""
    if bias is None:
        return pre
    return pre.to(torch.promote_types(pre.dtype, torch.float32)) + bias


def gelu_linear(
    pre: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None, approximate: str = "none"
) -> Tensor:
    """linear(gelu(pre + bias), weight, out_bias), with the activation rounded once, to pre's dtype.

    Args:
        pre: (..., H).
        bias: (H,).
        weight: (E, H).
        out_bias: (E,).
    Returns: (..., E).
    """
    act = F.gelu(with_bias(pre, bias), approximate=approximate).to(pre.dtype)
    return F.linear(act, weight, None if out_bias is None else out_bias.to(weight.dtype))


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str = "none",
) -> Tensor:
    """linear(gelu(linear(x, w1, b1)), w2, b2): x (..., D), w1 (H, D), w2 (E, H) to (..., E).

    A bias that is wider than its weight is added in its own precision.
    """
    if b1 is not None and b1.dtype == w1.dtype:
        return gelu_linear(F.linear(x, w1, b1), None, w2, b2, approximate)
    return gelu_linear(F.linear(x, w1), b1, w2, b2, approximate)
