"""UniDiffuser: one U-ViT that denoises an image and a text, each at a time of its own.

Tokens [t_img, t_text, (data type,) text, CLIP image, patches]. Its blocks normalise after each residual sum:
x ← norm2(x + attn(x)), x ← norm3(x + mlp(x)); an out block begins with x ← norm1(W·[x, skip] + b).
Source: Bao et al., arXiv 2303.06555.

Shapes: B batch, C channels, H/W height and width, N tokens, D width.
"""

import torch
from torch import Tensor, nn

from uvit.config import Grid, UniDiffuserConfig, patch_grid
from uvit.embed import PLAIN, Layout, PatchEmbed, fit_positions, timestep_embedding, unpatchify
from uvit.layers import Attention, LayerNorm, Mlp, SkipLinear, check_shapes, run_u, time_mlp


class PostNormBlock(nn.Module):
    """The repeated post-norm block; with `skip`, an out block."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False, skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, before_product=False) if skip else None
        self.norm2 = LayerNorm(width, before_product=False)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm3 = LayerNorm(width, before_product=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.skip_linear = SkipLinear(width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None, layout: Layout = PLAIN) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        if self.skip_linear is not None and self.norm1 is not None:
            x = self.norm1(self.skip_linear(x, skip))
        _, x = self.norm2.add(x, self.attn(x, layout.rope, layout.mask))
        _, x = self.norm3.add(x, self.mlp(x))
        return x


class UniDiffuser(nn.Module):
    """See the module's docstring. Use `uvit.build`, which also initialises the parameters."""

    pos_embed_token: nn.Parameter | None

    def __init__(self, config: UniDiffuserConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embed = PatchEmbed((1, patch, patch), config.in_channels, width)
        self.time_img_embed = time_mlp(width, config.time_embed)
        self.time_text_embed = time_mlp(width, config.time_embed)
        self.text_embed = nn.Linear(config.text_dim, width)
        self.text_out = nn.Linear(width, config.text_dim)
        self.clip_img_embed = nn.Linear(config.clip_dim, width)
        self.clip_img_out = nn.Linear(width, config.clip_dim)
        patches = config.grid[1] * config.grid[2]
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + config.text_tokens + 1 + patches, width))
        self.in_blocks = nn.ModuleList(self._block() for _ in range(config.depth // 2))
        self.mid_block = self._block()
        self.out_blocks = nn.ModuleList(self._block(skip=True) for _ in range(config.depth // 2))
        self.norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch * patch * config.in_channels)
        self.token_embedding = nn.Embedding(2, width) if config.data_type_token else None
        self.pos_embed_token = nn.Parameter(torch.zeros(1, 1, width)) if config.data_type_token else None

    def _block(self, skip: bool = False) -> PostNormBlock:
        c = self.config
        return PostNormBlock(c.width, c.heads, c.mlp_ratio, c.qkv_bias, skip)

    def forward(
        self,
        img: Tensor,
        clip_img: Tensor,
        text: Tensor,
        t_img: Tensor,
        t_text: Tensor,
        data_type: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the noise of the three inputs.

        Args:
            img: (B, C, H, W) latents, of any size that the patch divides.
            clip_img: (B, 1, clip_dim).
            text: (B, text_tokens, text_dim).
            t_img, t_text: (B,) times in 0 … 1000; fp32 or integer.
            data_type: (B,) int64, 0 or 1; version 1 only.
        Returns: (img, clip_img, text), shaped as the inputs.
        Raises:
            ValueError: where the inputs do not fit the configuration.
        """
        grid = self._check(img, clip_img, text, t_img, t_text, data_type)
        dtype = self.patch_embed.proj.weight.dtype
        text_tokens = self.text_embed(text.to(dtype))
        clip_token = self.clip_img_embed(clip_img.to(dtype))
        patches = self.patch_embed(img.unsqueeze(2))
        heads = [self._time(self.time_img_embed, t_img), self._time(self.time_text_embed, t_text)]
        if self.token_embedding is not None:
            heads.append(self.token_embedding(data_type)[:, None])
        x = torch.cat([*heads, text_tokens, clip_token, patches], dim=1) + self._positions(grid)  # (B, N, D)
        x = self.norm(run_u(x, self.in_blocks, self.mid_block, self.out_blocks))
        sizes = [len(heads), text.shape[1], 1, patches.shape[1]]
        _, text_tokens, clip_token, patches = x.split(sizes, dim=1)
        side = self.config.patch_size
        out = unpatchify(self.decoder_pred(patches), grid, (1, side, side))
        return out, self.clip_img_out(clip_token), self.text_out(text_tokens)

    def _check(self, img: Tensor, clip_img: Tensor, text: Tensor, *labels: Tensor | None) -> Grid:
        c, batch = self.config, img.shape[0]
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
            "img": (img, (batch, c.in_channels, *img.shape[2:4])),
            "clip_img": (clip_img, (batch, 1, c.clip_dim)),
            "text": (text, (batch, c.text_tokens, c.text_dim)),
            "t_img": (labels[0], (batch,)),
            "t_text": (labels[1], (batch,)),
            "data_type": (labels[2], (batch,) if c.data_type_token else None),
        }
        check_shapes(wanted, f"data_type_token = {c.data_type_token} (version 1 has it, version 0 does not)")
        return patch_grid((1, img.shape[2], img.shape[3]), (1, c.patch_size, c.patch_size))

    def _time(self, embed: nn.Module, timesteps: Tensor) -> Tensor:
        dtype = self.patch_embed.proj.weight.dtype
        token: Tensor = embed(timestep_embedding(timesteps, self.config.width).to(dtype))[:, None]
        return token  # (B, 1, D)

    def _positions(self, grid: Grid) -> Tensor:
        table = fit_positions(self.pos_embed, self.config.grid, grid)
        if self.pos_embed_token is None:
            return table
        return torch.cat([table[:, :2], self.pos_embed_token, table[:, 2:]], dim=1)
