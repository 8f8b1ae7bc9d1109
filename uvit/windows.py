"""Attention in windows of a video's space-time grid: the order of the tokens, and who sees whom.

Every patch sees a box of patches around it instead of all of them, tile by tile: see
`dtrain.kernels.block_mask.tile_windows`. Kernels skip what lies outside when the tokens of a tile stand
together, so the network puts its tokens in tile order once, after the positions are added, and back in
raster order before its head. Attention then costs 4·D FLOPs per pair that sees each other, not 4·D·N²; on a
CPU it computes all pairs all the same, with the mask written out.
Source: Zhang et al., Sliding Tile Attention, arXiv 2502.04507.

Shapes: N tokens, extra ones included; P patches.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dtrain.kernels.block_mask import BlockLists, BlockMask, tile_order, tile_windows
from uvit.config import Grid


class Windows(NamedTuple):
    """What a network needs to attend in windows.

    Args:
        order: (N,) int64, see `tile_order`.
        back: (P,) int64, where in that order the patches of raster order stand.
        mask: (N, N) tokens in that order.
    """

    order: Tensor
    back: Tensor
    mask: BlockMask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def windows_of(
    grid: Grid, tile: Grid, window: Grid, extra: int, device: torch.device | str = "cpu"
) -> Windows | None:
    """The windows of one size of video; made once for each size and device, and kept.

    Args:
        grid: patches along (time, height, width).
        tile, window: patches along each axis; a window of 0 is all of that axis.
        extra: tokens ahead of the patches, which see all and are seen by all.
    Returns: None where everything sees everything, which needs neither order nor mask.
    Raises:
        ValueError: see `tile_windows`.
    """
    window_TYX = tuple(side or whole for side, whole in zip(window, grid, strict=True))
    if all(side >= whole for side, whole in zip(window_TYX, grid, strict=True)):
        return None
    fake = detect_fake_mode()
    if fake is None:
        return _windows(grid, tile, window_TYX, extra, torch.device(device))
    # What is kept is real; a network of fake tensors gets fakes of it, which end with their mode.
    order, back, mask = _windows(grid, tile, window_TYX, extra, torch.device("cpu"))
    order, back, *lists = (fake.from_tensor(x) for x in (order, back, *mask.queries, *mask.keys))
    mask = dataclasses.replace(mask, queries=BlockLists(*lists[:2]), keys=BlockLists(*lists[2:]))
    return Windows(order.to(device), back.to(device), mask.to(device))


@functools.lru_cache(maxsize=64)
def _windows(grid: Grid, tile: Grid, window: Grid, extra: int, device: torch.device) -> Windows:
    # Kept for real training steps too, whoever asks first: a sampler in inference mode, a fake run.
    with unset_fake_temporarily(), torch.inference_mode(False):
        order = tile_order(grid, tile, extra, device="cpu")
        mask = tile_windows(grid, tile, window, extra)
        return Windows(order.to(device), order.argsort()[extra:].to(device), mask.to(device))
