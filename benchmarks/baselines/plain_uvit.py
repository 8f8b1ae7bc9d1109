"""U-ViT the way one writes it first: the published structure out of stock modules, nothing fused or saved.

    out = Conv3x3(unpatchify(Linear(LN(blocks([label?, time, patches] + positions)))))
    block(x) = x + MLP(LN(x'))  with  x' = x + Attention(LN(x));  an out block first maps cat[x, skip] 2D -> D

Parameter names are those of the official checkpoints.
Source: Bao et al., All are Worth Words, https://arxiv.org/abs/2209.12152

Shapes: B images, C channels, S side, P patch side, N patches, L tokens, D width, H heads, K width of a head.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, K)
        x = self.attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # (B, N, D)


class PlainUViT(nn.Module):
    """Class-conditional (num_classes > 0) or unconditional U-ViT without a time MLP."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        num_classes: int = 0,
        conv: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size, self.channels, self.width = patch_size, in_chans, embed_dim
        self.extras = 2 if num_classes > 0 else 1
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        tokens = self.extras + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.in_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth // 2))
        self.mid_block = Block(embed_dim, num_heads)
        self.out_blocks = nn.ModuleList(Block(embed_dim, num_heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, S, S), timesteps (B,), y (B,) classes -> (B, C, S, S)."""
        side = x.shape[-1] // self.patch_size
        time = timestep_embedding(timesteps, self.width).to(self.pos_embed.dtype)
        x = torch.cat([time.unsqueeze(1), self.patch_embed(x)], dim=1)
        if self.label_emb is not None and y is not None:
            x = torch.cat([self.label_emb(y).unsqueeze(1), x], dim=1)
        x = x + self.pos_embed  # (B, L, D)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras :]  # (B, N, P·P·C)
        return self.final_layer(self._unpatchify(x, side))  # type: ignore[no-any-return]

    def _unpatchify(self, x: Tensor, side: int) -> Tensor:
        p = self.patch_size
        x = x.reshape(x.shape[0], side, side, p, p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.channels, side * p, side * p)


class ClipEmbed(nn.Module):
    def __init__(self, patch: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # (B, N, D)


class PlainVideoUViT(PlainUViT):
    """The same for clips (B, C, T, H, W): patches in time too, no convolution at the end."""

    def __init__(
        self,
        size: tuple[int, int, int],
        patch: tuple[int, int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int = 0,
    ) -> None:
        super().__init__(patch[1], patch[1], in_chans, embed_dim, depth, num_heads, num_classes, conv=False)
        self.patch = patch
        self.grid = tuple(side // p for side, p in zip(size, patch, strict=True))
        self.patch_embed = ClipEmbed(patch, in_chans, embed_dim)  # type: ignore[assignment]
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + math.prod(self.grid), embed_dim))
        self.decoder_pred = nn.Linear(embed_dim, math.prod(patch) * in_chans)

    def _unpatchify(self, x: Tensor, side: int) -> Tensor:
        x = x.reshape(x.shape[0], *self.grid, *self.patch, self.channels)
        sizes = [n * p for n, p in zip(self.grid, self.patch, strict=True)]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], self.channels, *sizes)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """cos then sin of t / 10000^(2i/width), i < width/2: (B,) -> (B, width)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
