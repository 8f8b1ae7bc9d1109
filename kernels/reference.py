"""Every op of this project in eager PyTorch: the ground truth of the tests, and the path taken on a CPU.

A fused kernel is right when it agrees with its definition here, forwards and backwards. Each definition works
in fp64, fp32 and bf16, under autocast and under torch.compile.

Shapes: B batch, N tokens, H heads, D width (of a head where H is present), T/Y/X token grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v for every head, (B, H, N, D), without storing the N × N scores where PyTorch can."""
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)


def softmax_attention(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """`attention` written as its equation: the whole score matrix, in the inputs' own precision."""
    scores_BHNN = q_BHND @ k_BHND.transpose(-2, -1) / math.sqrt(q_BHND.shape[-1])
    return scores_BHNN.softmax(dim=-1) @ v_BHND


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cat([x, skip])·Wᵀ + b without the concatenation: x·W₁ᵀ + skip·W₂ᵀ + b, with W₁ and W₂ views of W.

    Autograd would keep the 2D-wide concatenation for the backward pass; x and skip it keeps anyhow.
    The second product adds into a new tensor rather than in place: autocast and FLOP counters know `addmm`
    but not `addmm_`.

    Args:
        x, skip: (..., D).
        weight: (E, 2D); the first D columns act on x.
        bias: (E,).
    Returns: (..., E).
    """
    weight_x, weight_skip = weight.chunk(2, dim=1)
    out = torch.addmm(bias, x.flatten(0, -2), weight_x.t())
    out = torch.addmm(out, skip.flatten(0, -2), weight_skip.t())
    return out.view(*x.shape[:-1], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dim, computed in fp32 or better; (..., D) in x's dtype.

    Source: Zhang & Sennrich, arXiv 1910.07467.
    """
    # PyTorch's fused path needs one dtype; under autocast the weight is fp32 and x may be bf16.
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every token by the token's angles, in the tables' precision.

    Args:
        x: (..., N, D) queries or keys.
        cos, sin: (N, D/2) fp32, see `rope_angles`.
    Returns: (..., N, D) in x's dtype. Source: Su et al., arXiv 2104.09864.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_angles(
    grid: tuple[int, int, int],
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angles of a 3-axis rotary embedding, (T·Y·X, head_dim/2) in fp32.

    Height and width own a third of the pairs each, rounded down, time the rest; pair i of an axis with n
    pairs turns by theta^(-i/n) per step along that axis.

    Args:
        grid: tokens along time, height and width.
        head_dim: even, at least 6.
        theta: base of the frequencies.
    """
    pairs = head_dim // 2
    pairs_by_axis = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = []
    for axis, (size, count) in enumerate(zip(grid, pairs_by_axis, strict=True)):
        frequency = theta ** (-torch.arange(count, dtype=torch.float32, device=device) / count)
        angle = torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequency
        shape = [size if axis == other else 1 for other in range(3)]
        axes.append(angle.view(*shape, count).expand(*grid, count))
    return torch.cat(axes, dim=-1).flatten(0, 2)
