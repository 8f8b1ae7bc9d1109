"""DiT the way its authors wrote it: adaLN-zero blocks out of stock modules, nothing fused or saved.

    block(x, c) = x + g1·Attention(LN(x)(1 + s1) + t1), then x + g2·MLP(LN(x)(1 + s2) + t2)
    with (t1, s1, g1, t2, s2, g2) = Linear(SiLU(c)),  c = time + label

Source: Peebles & Xie, Scalable Diffusion Models with Transformers, https://arxiv.org/abs/2212.09748

Shapes: B images, C channels, S side, P patch side, N tokens, D width, H heads, K width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain_uvit import PatchEmbed, timestep_embedding

__all__ = ["PlainDiT"]

_SINUSOIDS = 256


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, K)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class PlainDiT(nn.Module):
    """Class-conditional; predicts what it is asked for, in as many channels as it gets."""

    def __init__(
        self, side: int, patch: int, channels: int, width: int, depth: int, heads: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = nn.Sequential(nn.Linear(_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(num_classes, width)
        # A table of sinusoids in the paper, kept as a parameter without a gradient.
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, patch**2 * channels)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """x (B, C, S, S), timesteps (B,), y (B,) classes -> (B, C, S, S)."""
        batch, _, side, _ = x.shape
        sinusoids = timestep_embedding(timesteps, _SINUSOIDS).to(self.linear.weight.dtype)
        condition = self.t_embedder(sinusoids) + self.y_embedder(y)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        x = self.linear(self.norm(x) * (1 + scale) + shift)  # (B, N, P·P·C)
        p, n = self.patch, side // self.patch
        x = x.reshape(batch, n, n, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, self.channels, side, side)
