"""From pixels and times to tokens and back: patches, sinusoids, positions.

A patch embedding is a convolution whose stride is its kernel, so it is one matrix product of the unfolded
patches with the convolution's weight, seen as a matrix. Sources: Bao et al., arXiv 2209.12152 (tokens);
Bao et al., arXiv 2303.06555 (interpolated table); Su et al., arXiv 2104.09864 (rotary positions).

Shapes: B batch, C channels, T/H/W frames, height, width; t/h/w patches along them; p* sides of a patch;
N = t·h·w patches, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.kernels.block_mask import BlockMask
from dtrain.kernels.reference import rope_angles
from uvit.config import Grid


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """cos(t·f), sin(t·f) with width/2 frequencies f from 1 down to almost 1/max_period; (B, width) in fp32.

    Args:
        timesteps: (B,) integers or floats of at least 32 bits, in the schedule's units (0 … 1000).
    Raises:
        ValueError: for 16-bit times: bf16 rounds a time near 1000 by up to 2.
    """
    if timesteps.is_floating_point() and timesteps.element_size() < 4:
        raise ValueError(
            f"timesteps have dtype {timesteps.dtype}, which rounds them: pass float32 "
            "(under FSDP2, MixedPrecisionPolicy(cast_forward_inputs=False): the model casts its own inputs)"
        )
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def patchify(x_BCTHW: Tensor, patch_size: Grid) -> Tensor:
    """Unfold a video into its patches, (B, t·h·w, C·pt·ph·pw): the order of a convolution's weight."""
    (b, c, *size), (pt, ph, pw) = x_BCTHW.shape, patch_size
    t, h, w = (side // patch for side, patch in zip(size, patch_size, strict=True))
    x = x_BCTHW.reshape(b, c, t, pt, h, ph, w, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t * h * w, c * pt * ph * pw)


def unpatchify(x: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """Fold patches (B, t·h·w, pt·ph·pw·C) into frames (B·T, C, H, W)."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
    return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(-1, x.shape[-1], h * ph, w * pw)


class PatchEmbed(nn.Module):
    """Patches to tokens, with a convolution's weight: (D, C, ph, pw), or (D, C, pt, ph, pw) for pt > 1."""

    def __init__(self, patch_size: Grid, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        pt, ph, pw = patch_size
        self.proj: nn.Conv2d | nn.Conv3d
        if pt == 1:
            self.proj = nn.Conv2d(in_channels, width, kernel_size=(ph, pw), stride=(ph, pw))
        else:
            self.proj = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        weight = self.proj.weight
        patches = patchify(x_BCTHW.to(weight.dtype), self.patch_size)
        return F.linear(patches, weight.flatten(1), self.proj.bias)  # (B, N, D)


class Rope:
    """Rotations of all tokens, fp32: cos and sin (tokens, head_dim/2).

    A plain object, neither tuple nor dataclass: FSDP2 looks into those for tensors and casts them to the
    compute dtype, and bf16 moves a cosine by up to 0.4 %.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


class Layout:
    """What attention knows of the tokens beside their features: where each stands, and who sees whom.

    A plain object for the same reason as `Rope`, which passes through blocks, checkpoints and compiled code.

    Args:
        rope: rotations; None where positions are in the features.
        mask: blocks of tokens that see each other; None where all do.
    """

    def __init__(self, rope: Rope | None = None, mask: BlockMask | None = None) -> None:
        self.rope = rope
        self.mask = mask


PLAIN = Layout()


def rope_table(extra: int, grid: Grid, head_dim: int, device: torch.device) -> Rope:
    """Rotations of `extra` tokens, which stay as they are, followed by the patches of `grid`.

    Computed anew in each forward pass: that costs 0.2 % of one block (width 512, 1,358 tokens, a CPU core),
    whereas a buffer would be left unfilled by `to_empty` and a cache would leak fake tensors into real runs.
    """
    angles = F.pad(rope_angles(grid, head_dim, device=device), (0, 0, extra, 0))
    return Rope(angles.cos(), angles.sin())


def fit_positions(table_1LD: Tensor, native: Grid, grid: Grid) -> Tensor:
    """The position table for another size: its patch part interpolated linearly along each axis.

    Args:
        table_1LD: (1, extra + N, D) with N the patches of `native`.
        native, grid: patches along (time, height, width), of the table and wanted.
    Returns: (1, extra + N', D); the table itself where the grids agree.
    """
    if grid == native:
        return table_1LD
    extra = table_1LD.shape[1] - math.prod(native)
    patches = table_1LD[:, extra:].transpose(1, 2).unflatten(2, native).float()  # (1, D, t, h, w)
    patches = F.interpolate(patches, grid, mode="trilinear", align_corners=False)
    return torch.cat([table_1LD[:, :extra], patches.flatten(2).transpose(1, 2).to(table_1LD.dtype)], dim=1)
