"""The MLP of a transformer block: linear, GELU, linear.

    out = gelu(x·W1ᵀ + b1)·W2ᵀ + b2

Plain PyTorch keeps 2·R·H elements of the hidden layer for the backward pass, before and after GELU. Here it
keeps R·H, the first product (`gelu_linear`), or none in `chunks` pieces (`chunked_mlp`).

Shapes: R rows, D width of the input, H hidden width, E width of the output.
"""

import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels import mlp_reference as reference
from dtrain.kernels.chunked_mlp import chunked_mlp, split_bias
from dtrain.kernels.gelu_linear import Approximate, gelu_linear_op, serving
from dtrain.kernels.linear import check_layer, compute_dtype
from dtrain.kernels.serving import Backend

__all__ = ["mlp"]


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: Approximate = "none",
    chunks: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """linear(gelu(linear(x, w1, b1)), w2, b2), differentiable.

    Dtypes are those of F.linear, under autocast too, except that biases may be wider.

    In pieces, a weight's gradient is summed over them in that weight's dtype. With bf16 parameters each piece
    adds a rounding, up to 2⁻⁹ of the sum so far: about √chunks times the error of one product. With fp32
    parameters under autocast the sum is in fp32. The biases' gradients are always summed in fp32 or better.

    Args:
        x: (..., D), any strides.
        w1: (H, D).
        b1: (H,) or None.
        w2: (E, H).
        b2: (E,) or None.
        approximate: "none" is the exact GELU, "tanh" its approximation.
        chunks: into how many pieces, as even as they can be, the rows are split, at least 1. With more than
            one, x alone is kept and the first product is computed twice, a sixth more FLOPs in a training
            step; at most two pieces of the hidden layer are in memory.
        backend: "triton" has GELU by kernels, for fp16, bf16 and fp32; "auto" has them on a GPU and PyTorch's
            own passes on a CPU. "reference" is plain PyTorch, which keeps everything, in one piece.
    Returns: (..., E).
    Raises:
        ValueError: shapes or dtypes do not fit, or the chosen backend cannot serve.
    """
    check_layer(x.shape[-1], w1, b1, ("w1", "b1"))
    check_layer(w1.shape[0], w2, b2, ("w2", "b2"))
    if chunks < 1:
        raise ValueError(f"chunks = {chunks}: must be at least 1")
    (x,) = compute_dtype({"x": x}, {"w1": w1, "w2": w2}, {"b1": b1, "b2": b2})
    path = serving(backend, approximate, x.device, x.dtype)
    if path == "reference":
        return reference.mlp(x, w1, b1, w2, b2, approximate)
    fused = path == "kernels"
    if chunks > 1:
        pieces: Tensor = chunked_mlp(x, w1, b1, w2, b2, approximate, chunks, fused)
        return pieces
    in_product, in_gelu = split_bias(w1, b1, fused)
    out: Tensor = gelu_linear_op(F.linear(x, w1, in_product), in_gelu, w2, b2, approximate, fused)
    return out
