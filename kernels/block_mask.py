"""Which queries see which keys, in blocks: lists that let attention skip what a mask leaves out.

A mask written out is M·N booleans, and kernels that read it save nothing. Video masks are coarse: whole
frames, whole clips, whole tiles of a space-time grid. So a mask here is a list of key blocks for each query
block, and its transpose for the backward pass; listed pairs of blocks see each other entirely. Blocks end
where a frame, clip or tile ends, which leaves none of them half masked: some hold fewer tokens than others.

Sources: Zhang et al., Sliding Tile Attention, arXiv 2502.04507 (tiles); Hassani et al., Generalized
Neighborhood Attention, arXiv 2504.16922 (windows shifted at the border).

Shapes: M queries, N keys, T/H/W token grid; n blocks of one side, e entries of all their lists.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockLists", "BlockMask", "block_causal", "from_blocks", "packed", "tile_order", "tile_windows"]

Grid = tuple[int, int, int]

_MOST_TOKENS = 2**31 - 1
_MOST_ENTRIES = 2**28  # kernels that cut a block into up to eight count the pieces in int32


class BlockLists(NamedTuple):
    """For each block of one side, the blocks of the other side that it meets. Both int32.

    Args:
        blocks: (n, 5), in the order of their tokens: first token, tokens, first entry, first partial entry,
            end of entries.
        entries: (e, 2): first token and tokens of a block of the other side. Whole blocks, which hold as
            many tokens as a block may, come first in each list, partial ones last.
    """

    blocks: Tensor
    entries: Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask that all batches and heads share. Made by the functions of this file.

    Args:
        shape: (M, N) in tokens.
        block: the most tokens that a query block and a key block hold; powers of two, at least 16.
        queries: for each query block its key blocks. A block without any has output 0.
        keys: the transpose: for each key block its query blocks.
        pairs: (query, key) pairs of tokens that see each other: 4·pairs·D FLOPs a head, forward.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    queries: BlockLists
    keys: BlockLists
    pairs: int

    def __post_init__(self) -> None:
        _check_block(self.block)
        if min(self.shape) < 1:
            raise ValueError(f"shape = {self.shape}: queries and keys must be at least one token each")
        if len(self.queries.entries) > _MOST_ENTRIES:
            raise ValueError(
                f"block = {self.block}: {len(self.queries.entries):,} pairs of blocks, the most is "
                f"{_MOST_ENTRIES:,}; larger blocks make fewer"
            )
        assert all(x.dtype == torch.int32 for x in (*self.queries, *self.keys))

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.queries.blocks.device

    @property
    def density(self) -> float:
        """Part of the M·N pairs that is computed, 0 … 1."""
        return self.pairs / math.prod(self.shape)

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask with its lists on another device."""
        queries, keys = (BlockLists(*(x.to(device) for x in lists)) for lists in (self.queries, self.keys))
        return dataclasses.replace(self, queries=queries, keys=keys)

    def dense(self) -> Tensor:
        """(M, N) bool, true where the query sees the key; read from the queries' lists, on their device."""
        blocks, entries = self.queries
        tokens, lists = blocks[:, 1], blocks[:, 4] - blocks[:, 2]
        row = torch.arange(len(blocks), device=self.device).repeat_interleave(lists, output_size=len(entries))
        # +1 where a key block begins, -1 behind its end: the running sum is 1 inside.
        edges = torch.zeros(len(blocks), self.shape[1] + 1, dtype=torch.int32, device=self.device)
        for column, sign in ((entries[:, 0], 1), (entries[:, 0] + entries[:, 1], -1)):
            edges.index_put_((row, column), edges.new_full((), sign), accumulate=True)
        seen = edges.cumsum(1)[:, :-1] > 0
        return seen.repeat_interleave(tokens, dim=0, output_size=self.shape[0])

    def __repr__(self) -> str:
        return (
            f"BlockMask(shape={self.shape}, block={self.block}, density={self.density:.2%}, "
            f"{len(self.queries.blocks)} x {len(self.keys.blocks)} blocks, "
            f"{len(self.queries.entries)} entries, device={str(self.device)!r})"
        )


def from_blocks(
    query_lengths: Sequence[int] | Tensor,
    key_lengths: Sequence[int] | Tensor,
    allowed: Tensor,
    block: tuple[int, int],
) -> BlockMask:
    """The mask of regions that see each other entirely or not at all; the base of all others.

    Args:
        query_lengths, key_lengths: tokens of consecutive regions. A region longer than a block spans several
            blocks, an empty one none.
        allowed: (query regions, key regions) bool.
        block: the most tokens that a query block and a key block hold; powers of two, at least 16.
    Returns: lists on the CPU. GPU tensors are read back, which waits for the GPU.
    Raises:
        ValueError: where lengths, `allowed` or `block` are none of this.
    """
    _check_block(block)
    lengths = _lengths("query_lengths", query_lengths), _lengths("key_lengths", key_lengths)
    wanted = (len(lengths[0]), len(lengths[1]))
    if allowed.dtype != torch.bool or tuple(allowed.shape) != wanted:
        raise ValueError(
            f"allowed has dtype {allowed.dtype} and shape {tuple(allowed.shape)}: must be bool, {wanted}"
        )
    (rows, queries), (columns, keys) = (_split(*pair) for pair in zip(lengths, block, strict=True))
    pairs_of_blocks = allowed.cpu()[rows][:, columns]
    lists = _lists(queries, keys, pairs_of_blocks, block[1])
    counts = lists.blocks[:, 4] - lists.blocks[:, 2]
    return BlockMask(
        shape=(int(queries.sum()), int(keys.sum())),
        block=block,
        queries=lists,
        keys=_lists(keys, queries, pairs_of_blocks.T, block[0]),
        pairs=int((queries.repeat_interleave(counts) * lists.entries[:, 1]).sum()),
    )


def _split(lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Cut regions into blocks: the region of each block, and its tokens."""
    counts = (lengths + most - 1) // most
    region = torch.arange(len(lengths), device="cpu").repeat_interleave(counts)
    last = counts.cumsum(0)[counts > 0] - 1
    tokens = torch.full_like(region, most)
    tokens[last] = (lengths - (counts - 1) * most)[counts > 0]
    return region, tokens


def _lists(own: Tensor, others: Tensor, meets: Tensor, most: int) -> BlockLists:
    """Lists from the tokens of each block, (n,) and (n'), and (n, n') bool of which meet."""
    order = (others < most).int().argsort(stable=True)  # whole blocks first, each kind in order
    meets = meets[:, order]
    other = order[meets.nonzero()[:, 1]]
    entries = torch.stack([_starts(others)[other], others[other]], dim=1)
    counts, whole = meets.sum(1), meets[:, : int((others == most).sum())].sum(1)
    first = _starts(counts)
    blocks = torch.stack([_starts(own), own, first, first + whole, first + counts], dim=1)
    return BlockLists(blocks.int(), entries.int())


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def packed(
    cu_seqlens_q: Sequence[int] | Tensor,
    cu_seqlens_k: Sequence[int] | Tensor | None = None,
    block: tuple[int, int] = (128, 128),
) -> BlockMask:
    """Clips of any length one after the other, each of which sees itself only.

    Args:
        cu_seqlens_q: (clips + 1,) cumulative lengths, from 0 to M: clip i has the queries from the i-th of
            them up to the next. Clips may be empty. A GPU tensor is read back, which waits for the GPU.
        cu_seqlens_k: the same of the keys, from 0 to N; as the queries' when None. The queries of a clip
            without keys have output 0.
        block: see `from_blocks`.
    Raises:
        ValueError: where the lengths do not start at 0, descend, or belong to two numbers of clips.
    """
    queries = _clips("cu_seqlens_q", cu_seqlens_q)
    keys = queries if cu_seqlens_k is None else _clips("cu_seqlens_k", cu_seqlens_k)
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens_k has {len(keys)} clips, cu_seqlens_q {len(queries)}: must be as many; "
            "repeat a number for a clip without tokens"
        )
    return from_blocks(queries, keys, torch.eye(len(queries), dtype=torch.bool, device="cpu"), block)


def _clips(name: str, cumulative: Sequence[int] | Tensor) -> Tensor:
    bounds = _integers(name, cumulative)
    if len(bounds) < 2 or int(bounds[0]) != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"{name} = {_short(bounds)}: must begin with 0 and ascend to the number of tokens; "
            "clips of 3, 0 and 4 tokens are (0, 3, 3, 7)"
        )
    return bounds.diff()


def block_causal(
    frames: int, tokens_per_frame: int, prefix: int = 0, block: tuple[int, int] | None = None
) -> BlockMask:
    """Frames that see themselves, all earlier ones and the prefix, which sees itself only.

    Args:
        prefix: tokens ahead of the frames: time, text.
        block: see `from_blocks`; fitted to the frame when None.
    """
    for name, value, least in (
        ("frames", frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("prefix", prefix, 0),
    ):
        _at_least(name, value, least)
    lengths = [prefix] + [tokens_per_frame] * frames
    earlier = torch.ones(len(lengths), len(lengths), dtype=torch.bool, device="cpu").tril()
    return from_blocks(lengths, lengths, earlier, block or _fitting(tokens_per_frame))


def tile_windows(
    grid: Grid, tile: Grid, window: Grid, prefix: int = 0, block: tuple[int, int] | None = None
) -> BlockMask:
    """Tiles of a space-time grid that see the tiles of a window around them, for tokens in `tile_order`.

    At the border of the grid the window is moved inwards, not cut: every tile sees as many. A window of an
    even number of tiles reaches one tile further back than ahead. The prefix sees all and is seen by all.

    Args:
        grid: tokens along (time, height, width). Where the tile does not divide it, tiles at the end are
            smaller.
        tile: tokens along each axis. One that holds more tokens than a block spans several.
        window: tokens along each axis, a multiple of the tile; as large as the grid or larger, it is all.
        prefix: tokens ahead of the grid: time, text.
        block: see `from_blocks`; fitted to the tile when None.
    Raises:
        ValueError: where a size is no positive number, or a window no multiple of the tile.
    """
    _check_tiles(grid, tile, prefix)
    axes = [_axis(*sizes) for sizes in zip(("time", "height", "width"), grid, tile, window, strict=True)]
    sees = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    lengths = torch.ones(1, dtype=torch.int64, device="cpu")
    for axis_lengths, axis_sees in axes:
        lengths = (lengths[:, None] * axis_lengths).flatten()
        sees = torch.kron(sees, axis_sees)
    lengths = torch.cat([lengths.new_tensor([prefix]), lengths])
    sees = torch.nn.functional.pad(sees, (1, 0, 1, 0), value=True)
    return from_blocks(lengths, lengths, sees, block or _fitting(math.prod(tile)))


def _axis(name: str, size: int, tile: int, window: int) -> tuple[Tensor, Tensor]:
    """Along one axis: tokens of each tile, and (tiles, tiles) bool of which see which."""
    if window < size and (window < tile or window % tile):
        near = max(1, round(window / tile)) * tile
        raise ValueError(
            f"window = {window} along {name}: must be a multiple of the tile's {tile} tokens, or cover the "
            f"grid's {size}; {near} would be right"
        )
    start = torch.arange(0, size, tile, device="cpu")
    tiles = start // tile
    count = min(-(-window // tile), len(start))
    first = (tiles - count // 2).clamp(0, len(start) - count)
    ahead = tiles - first[:, None]
    return (size - start).clamp(max=tile), (ahead >= 0) & (ahead < count)


def tile_order(grid: Grid, tile: Grid, prefix: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The tokens of a grid tile by tile, (N,) int64: the i-th of them is number order[i] of raster order.

    `x[:, order]` puts the tokens of (B, N, D) into tile order, `x[:, order.argsort()]` back. Tiles, and the
    tokens within each, are in raster order; the prefix stays ahead.

    Args:
        grid, tile, prefix: see `tile_windows`.
    """
    _check_tiles(grid, tile, prefix)
    counts = [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    number = torch.zeros((), dtype=torch.int64, device=device)  # of a token's tile, (T, H, W) in the end
    for size, side, count in zip(grid, tile, counts, strict=True):
        number = number[..., None] * count + torch.arange(size, device=device) // side
    order = number.flatten().argsort(stable=True)
    return torch.cat([torch.arange(prefix, device=device), prefix + order])


def _check_tiles(grid: Grid, tile: Grid, prefix: int) -> None:
    for name, sizes in (("grid", grid), ("tile", tile)):
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"{name} = {tuple(sizes)}: must be three positive numbers: time, height, width")
    _at_least("prefix", prefix, 0)


def _fitting(tokens: int) -> tuple[int, int]:
    """The blocks for regions of so many tokens: 128 or 64, what pads less; 32 or 16 for the smallest."""
    least = next((size for size in (16, 32) if tokens <= size), 64)
    sizes = [size for size in (128, 64, 32, 16) if size >= least]
    best = min(sizes, key=lambda size: -(-tokens // size) * size)
    return best, best


def _check_block(block: tuple[int, int]) -> None:
    if len(block) != 2 or any(size < 16 or size & (size - 1) for size in block):
        raise ValueError(f"block = {tuple(block)}: must be two powers of two, at least 16, as (128, 128)")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")


def _lengths(name: str, values: Sequence[int] | Tensor) -> Tensor:
    lengths = _integers(name, values)
    if bool((lengths < 0).any()):
        raise ValueError(f"{name} = {int(lengths.min())} among them: must be at least 0")
    if int(lengths.sum()) > _MOST_TOKENS:
        raise ValueError(f"{name} = {int(lengths.sum()):,} in all: must be at most {_MOST_TOKENS:,} tokens")
    return lengths


def _integers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """(n,) int64 on the CPU."""
    given = torch.as_tensor(values, device="cpu")
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"{name} = {_short(given)}: must be a list or a 1-D tensor of integers")
    return given.long()


def _short(values: Tensor) -> str:
    return str(values.flatten()[:8].tolist()) + (" …" if values.numel() > 8 else "")
