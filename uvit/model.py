"""U-ViT for images and video: every input is a token, joined by long skips across the depth.

Tokens [label, time, patches], [time, text, patches] or [time, patches]; depth/2 in blocks, a mid block,
depth/2 out blocks; LayerNorm, linear, unpatchify, 3×3 convolution. The official state keys fit unchanged.
Source: Bao et al., arXiv 2209.12152; video as in Vidu, arXiv 2405.04233.

Shapes: B batch, C channels, T/H/W frames, height, width, N tokens, D width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from uvit.config import Grid, UViTConfig, patch_grid
from uvit.embed import Layout, PatchEmbed, Rope, fit_positions, rope_table, timestep_embedding, unpatchify
from uvit.layers import Block, LayerNorm, RMSNorm, check_shapes, run_u, time_mlp
from uvit.windows import windows_of

Fill = Callable[[Tensor, torch.Generator], object]


class UViT(nn.Module):
    """See the module's docstring. Use `uvit.build`, which also initialises the parameters."""

    pos_embed: nn.Parameter | None

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        width, condition = config.width, config.condition
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, width)
        self.time_embed = time_mlp(width, config.time_embed)
        self.label_emb = nn.Embedding(config.num_classes, width) if condition == "class" else None
        self.context_embed = nn.Linear(config.text_dim, width) if condition == "text" else None
        tokens = token_count(config, *config.input_size)
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width)) if learned else None
        self.in_blocks = nn.ModuleList(self._block() for _ in range(config.depth // 2))
        self.mid_block = self._block()
        self.out_blocks = nn.ModuleList(self._block(config.long_skips) for _ in range(config.depth // 2))
        self.norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_dim)
        channels = config.in_channels
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()

    def _block(self, skip: bool = False) -> Block:
        c = self.config
        return Block(c.width, c.heads, c.mlp_ratio, c.qkv_bias, c.qk_norm, skip)

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Predict noise, velocity or whatever the objective asks for.

        Args:
            x: (B, C, H, W) or (B, C, T, H, W), of any size that the patch divides.
            timesteps: (B,) in the units of the schedule (0 … 1000); fp32 or integer.
            y: (B,) int64 labels, for condition = "class".
            context: (B, text_tokens, text_dim), for condition = "text".
        Returns: as x, in the compute dtype.
        Raises:
            ValueError: where the inputs do not fit the configuration.
        """
        video = x.unsqueeze(2) if x.dim() == 4 else x
        grid = self._check(video, timesteps, y, context)
        tokens = torch.cat([*self._extra(timesteps, y, context), self.patch_embed(video)], dim=1)  # (B, N, D)
        tokens, layout, back = self._locate(tokens, grid)
        tokens = run_u(tokens, self.in_blocks, self.mid_block, self.out_blocks, layout)
        patches = tokens[:, self.config.extra_tokens :] if back is None else tokens.index_select(1, back)
        frames = self._head(patches, grid)  # (B·T, C, H, W)
        if x.dim() == 4:
            return frames
        # A copy: FSDP2 hooks the output, and an in-place operation on a view would lose its hook.
        frames_BTCHW: Tensor = frames.unflatten(0, (x.shape[0], -1))
        return frames_BTCHW.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def _check(self, video: Tensor, timesteps: Tensor, y: Tensor | None, context: Tensor | None) -> Grid:
        c = self.config
        if video.dim() != 5 or video.shape[1] != c.in_channels:
            raise ValueError(
                f"x has shape {tuple(video.shape)}: must be (B, {c.in_channels}, [T,] H, W) "
                f"for in_channels = {c.in_channels}"
            )
        batch = video.shape[0]
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
            "timesteps": (timesteps, (batch,)),
            "y": (y, (batch,) if c.condition == "class" else None),
            "context": (context, (batch, c.text_tokens, c.text_dim) if c.condition == "text" else None),
        }
        check_shapes(wanted, f"condition = {c.condition!r}")
        return patch_grid((video.shape[2], video.shape[3], video.shape[4]), c.patch_size)

    def _extra(self, timesteps: Tensor, y: Tensor | None, context: Tensor | None) -> list[Tensor]:
        dtype = self.patch_embed.proj.weight.dtype
        sinusoid = timestep_embedding(timesteps, self.config.width).to(dtype)
        time = self.time_embed(sinusoid)[:, None]  # (B, 1, D)
        if self.label_emb is not None:
            return [self.label_emb(y)[:, None], time]
        if self.context_embed is not None and context is not None:
            return [time, self.context_embed(context.to(dtype))]
        return [time]

    def _locate(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Layout, Tensor | None]:
        """Tokens with their positions and, for attention in windows, in tile order; what brings them back."""
        c, rope = self.config, None
        if self.pos_embed is None:
            rope = rope_table(c.extra_tokens, grid, c.head_dim, tokens.device)
        else:
            tokens = tokens + fit_positions(self.pos_embed, c.grid, grid)
        windows = windows_of(grid, c.window_tile, c.window, c.extra_tokens, tokens.device)
        if windows is None:
            return tokens, Layout(rope), None
        rope = rope and Rope(rope.cos[windows.order], rope.sin[windows.order])
        return tokens.index_select(1, windows.order), Layout(rope, windows.mask), windows.back

    def _head(self, patches: Tensor, grid: Grid) -> Tensor:
        patches = self.decoder_pred(self.norm(patches))
        frames: Tensor = self.final_layer(unpatchify(patches, grid, self.config.patch_size))
        return frames


def token_count(config: UViTConfig, frames: int, height: int, width: int) -> int:
    """Tokens of one sample of that size (pixels or latents), the extra ones included."""
    return config.extra_tokens + math.prod(patch_grid((frames, height, width), config.patch_size))


def forward_flops(config: UViTConfig, batch: int, frames: int, height: int, width: int) -> int:
    """FLOPs of a forward pass: 2 per multiply-add of every matrix product, attention and convolution.

    Of attention in windows, those of the pairs that see each other.
    """
    c, d = config, config.width
    tokens = token_count(c, frames, height, width)
    patches = tokens - c.extra_tokens
    weights = 4 * d * d + 2 * d * int(d * c.mlp_ratio)  # qkv, proj, fc1, fc2
    windows = windows_of(
        patch_grid((frames, height, width), c.patch_size), c.window_tile, c.window, c.extra_tokens
    )
    pairs = windows.mask.pairs if windows else tokens**2
    body = (c.depth + 1) * (2 * tokens * weights + 4 * pairs * d)
    skips = c.long_skips * (c.depth // 2) * 4 * tokens * d * d
    ends = 2 * (2 * patches * c.patch_dim * d)  # patch_embed and decoder_pred
    time = c.time_embed * 16 * d * d
    text = (c.condition == "text") * 2 * c.text_tokens * c.text_dim * d
    conv = c.final_conv * 2 * 9 * c.in_channels**2 * frames * height * width
    return batch * (body + skips + ends + time + text + conv)


def _uniform(bound: float) -> Fill:
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def _zeros(tensor: Tensor, _: torch.Generator) -> None:
    tensor.zero_()


def _ones(tensor: Tensor, _: torch.Generator) -> None:
    tensor.fill_(1.0)


def _narrow(tensor: Tensor, generator: torch.Generator) -> None:
    # The official trunc_normal_ cuts at ±2, which is 100 deviations: no cut.
    tensor.normal_(std=0.02, generator=generator)


def _rule(module: nn.Module, leaf: str) -> Fill:
    if isinstance(module, nn.Linear):
        return _narrow if leaf == "weight" else _zeros
    if isinstance(module, nn.LayerNorm | RMSNorm):
        return _ones if leaf == "weight" else _zeros
    if isinstance(module, nn.Embedding):
        return lambda tensor, generator: tensor.normal_(generator=generator)
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return _uniform((module.in_channels * math.prod(module.kernel_size)) ** -0.5)
    return {"pos_embed": _narrow, "pos_embed_token": _zeros}[leaf]


def initializer(model: nn.Module) -> Callable[[str, Tensor, torch.Generator], None]:
    """How the official models fill each parameter: fill(name, full_tensor, generator), in place.

    Linear weights and position tables are normal with std 0.02, embeddings N(0, 1), convolutions uniform
    within ±1/√fan_in, biases 0, norms 1. The caller hands in the whole fp32 CPU tensor and a generator
    seeded by the name, so that the weights do not depend on how the model is sharded.

    Args:
        model: a model of this package, sharded or not, on any device; names are its `named_parameters`.
    """
    rules = {
        f"{path}.{leaf}".lstrip("."): _rule(module, leaf)
        for path, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }

    @torch.no_grad()
    def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        rules[name](tensor, generator)

    return fill


@torch.no_grad()
def init_parameters(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise an unsharded model of this package on any device.

    Args:
        generator: a CPU generator; PyTorch's global one (torch.manual_seed) when None.
    """
    fill = initializer(model)
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        fill(name, full, generator or torch.default_generator)
        parameter.copy_(full)
