"""The attention half of a block the way one writes it first: stock modules, one operation after the other.

    x -> proj(attention(rope(norm_q(q)), rope(norm_k(k)), v))  with  [q, k, v] = qkv(LayerNorm(x))

Parameter names are those of `uvit.layers.Block`. Sources: Zhang & Sennrich, arXiv 1910.07467 (RMSNorm); Su et
al., arXiv 2104.09864 (rotary positions).

Shapes: B samples, N tokens, W width, H heads, D width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """(B, N, W) to (B, N, W); `attend` takes q, k, v (B, H, N, D)."""

    def __init__(self, width: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "q_norm": nn.RMSNorm(width // heads, eps=1e-6),
                "k_norm": nn.RMSNorm(width // heads, eps=1e-6),
                "proj": nn.Linear(width, width),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """cos, sin: (N, D/2) in fp32."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        q, k = rotate(self.attn["q_norm"](q), cos, sin), rotate(self.attn["k_norm"](k), cos, sin)
        out: Tensor = self.attn["proj"](self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every token by its angles; (B, H, N, D) in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
