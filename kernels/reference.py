"""Every op of this project in eager PyTorch: the ground truth of the tests, and the path taken on a CPU.

A fused kernel is right when it agrees with its definition here, forwards and backwards. Each definition works
in fp64, fp32 and bf16, under autocast and under torch.compile.

Shapes: B batch, N tokens (of queries M), H heads, D width (of a head where H is present), T/Y/X token grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_with_lse(
    q_BHMD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    scale: float | None = None,
    mask_MN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v for every head, and the log-sum-exp of the scores, in fp32 or better.

    Args:
        scale: 1/√D when None.
        mask_MN: bool, true where a query sees a key; all see all when None.
    Returns: out (B, H, M, D) in q's dtype, lse (B, H, M), natural. A query that sees no key has 0 and -∞.
    """
    scores_BHMN = _scores(q_BHMD, k_BHND, q_BHMD.shape[-1] ** -0.5 if scale is None else scale)
    if mask_MN is None:
        weights, lse = scores_BHMN.softmax(dim=-1), scores_BHMN.logsumexp(dim=-1)
    else:
        blind = ~mask_MN.any(dim=-1)  # kept out of the softmax, whose gradient there is NaN
        scores_BHMN = scores_BHMN.masked_fill(~(mask_MN | blind[:, None]), -torch.inf)
        weights = scores_BHMN.softmax(dim=-1).masked_fill(blind[:, None], 0.0)
        lse = scores_BHMN.logsumexp(dim=-1).masked_fill(blind, -torch.inf)
    out = weights @ v_BHND.to(weights.dtype)
    return out.to(q_BHMD.dtype), lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask_MN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_with_lse` by q, k and v, from its inputs and outputs, in the inputs' dtypes.

    ds = p ∘ (dout·vᵀ - Σ dout ∘ out + dlse), with p = exp(s - lse).
    """
    p_BHMN = (_scores(q, k, scale) - lse[..., None]).exp()
    if mask_MN is not None:  # exp(s + ∞) where a query sees no key
        p_BHMN = p_BHMN.masked_fill(~mask_MN, 0.0)
    wide = p_BHMN.dtype
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_v = p_BHMN.mT @ grad_out.to(wide)
    grad_s = p_BHMN * (grad_out.to(wide) @ v.to(wide).mT - delta[..., None]) * scale
    return (grad_s @ k.to(wide)).to(q.dtype), (grad_s.mT @ q.to(wide)).to(k.dtype), grad_v.to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ k.to(wide).mT * scale


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """cat([x, skip])·Wᵀ + b without the concatenation: x·W₁ᵀ + skip·W₂ᵀ + b, with W₁ and W₂ views of W.

    The second product adds into a new tensor rather than in place: autocast and FLOP counters know `addmm`
    but not `addmm_`.

    Args:
        x: (..., D).
        skip: (..., S).
        weight: (E, D + S); the first D columns act on x.
        bias: (E,).
    Returns: (..., E).
    """
    weight_x, weight_skip = weight.tensor_split((x.shape[-1],), dim=1)
    out = F.linear(x.reshape(-1, x.shape[-1]), weight_x, bias)
    out = torch.addmm(out, skip.reshape(-1, skip.shape[-1]), weight_skip.t())
    return out.view(*x.shape[:-1], weight.shape[0])


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


def qk_norm_rope(
    qkv_BN3HD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a packed qkv, normed over each head and rotated, and its values.

    Args:
        q_weight, k_weight: (D,), see `rms_norm`; None leaves them as they are.
        cos, sin: (N, D/2), see `apply_rope`; None rotates nothing.
    Returns: q, k, v (B, H, N, D); views where nothing is done.
    """
    q, k, v = qkv_BN3HD.permute(2, 0, 3, 1, 4).unbind(0)
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    if cos is not None and sin is not None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return q, k, v


def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `apply_rope(rms_norm(x))` by x and by the weight, in their dtypes, from the output's.

    With n = x·r and r = 1/√(mean(x²) + eps): dz is grad rotated backwards, dw = Σ dz ∘ n, and
    dx = r·(w ∘ dz - n · mean(w ∘ dz ∘ n)).

    Args:
        grad, x: (..., N, D).
        weight, cos, sin: None where that was left out.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    grad = grad.to(wide)
    if cos is not None and sin is not None:
        grad = apply_rope(grad, cos, -sin)
    if weight is None:
        return grad.to(x.dtype), None
    factor = (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = x.to(wide) * factor
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * weight
    grad = factor * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return grad.to(x.dtype), grad_weight.to(weight.dtype)


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
