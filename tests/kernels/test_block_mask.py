"""Block masks equal masks written out token by token, and their two lists are each other's transpose."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors

from dtrain.kernels.block_mask import (
    BlockLists,
    BlockMask,
    block_causal,
    from_blocks,
    packed,
    tile_order,
    tile_windows,
)

Grid = tuple[int, int, int]


def _transposed(mask: BlockMask) -> BlockMask:
    return BlockMask(mask.shape[::-1], mask.block[::-1], mask.keys, mask.queries, mask.pairs)


def _check_lists(lists: BlockLists, own: int, others: int, most: tuple[int, int]) -> None:
    """Blocks partition their side in order; each list is one run of entries, whole ones first."""
    blocks, entries = (x.tolist() for x in lists)
    assert [b[0] for b in blocks] == list(itertools.accumulate([0] + [b[1] for b in blocks]))[:-1]
    assert sum(b[1] for b in blocks) == own
    assert all(1 <= b[1] <= most[0] for b in blocks)
    assert [b[2] for b in blocks] == [0, *(b[4] for b in blocks[:-1])]
    assert not blocks or blocks[-1][4] == len(entries)
    for _, _, first, partial, end in blocks:
        assert all(tokens == most[1] for _, tokens in entries[first:partial])
        assert all(1 <= tokens < most[1] for _, tokens in entries[partial:end])
        starts = [start for start, _ in entries[first:end]]
        assert len(set(starts)) == len(starts)
        assert all(start + tokens <= others for start, tokens in entries[first:end])


def _check(mask: BlockMask, wanted: Tensor) -> None:
    assert mask.shape == tuple(wanted.shape)
    assert torch.equal(mask.dense(), wanted)
    assert torch.equal(_transposed(mask).dense(), wanted.T)
    assert mask.pairs == int(wanted.sum())
    assert mask.density == pytest.approx(wanted.double().mean().item())
    (m, n), block = mask.shape, mask.block
    _check_lists(mask.queries, m, n, block)
    _check_lists(mask.keys, n, m, block[::-1])


@pytest.mark.parametrize("block", [(16, 16), (16, 64), (32, 16), (128, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_regions_of_any_length(block: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(0, 70, (7,), generator=generator)
    keys = torch.randint(1, 90, (5,), generator=generator)
    allowed = torch.rand(7, 5, generator=generator) < 0.4
    wanted = allowed.repeat_interleave(queries, 0).repeat_interleave(keys, 1)
    _check(from_blocks(queries, keys.tolist(), allowed, block), wanted)


def _clip_of(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _bounds(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([5, 33, 16], [5, 33, 16]),
        ([1], [40]),
        ([0, 17, 0, 3], [4, 0, 0, 50]),  # clips without queries, without keys, without either
        ([3, 20, 0], [0, 0, 9]),  # nobody sees anybody
    ],
)
def test_packed_clips_see_themselves(queries: list[int], keys: list[int]) -> None:
    wanted = _clip_of(queries)[:, None] == _clip_of(keys)
    _check(packed(_bounds(queries), torch.tensor(_bounds(keys)), block=(16, 16)), wanted)
    if queries == keys:
        _check(packed(torch.tensor(_bounds(queries), dtype=torch.int32), block=(16, 32)), wanted)


@pytest.mark.parametrize(("frames", "tokens", "prefix"), [(1, 5, 0), (3, 20, 0), (4, 33, 7), (2, 16, 40)])
def test_frames_see_earlier_frames_and_the_prefix(frames: int, tokens: int, prefix: int) -> None:
    frame = torch.cat([torch.full((prefix,), -1), torch.arange(frames).repeat_interleave(tokens)])
    wanted = frame[:, None] >= frame
    _check(block_causal(frames, tokens, prefix, block=(16, 32)), wanted)
    _check(block_causal(frames, tokens, prefix), wanted)


def _window(i: int, side: int, tile: int, window: int) -> range:
    """Tokens along one axis that token i of it sees, counted out."""
    tiles, wide = -(-side // tile), min(-(-window // tile), -(-side // tile))
    first = min(max(i // tile - wide // 2, 0), tiles - wide)
    return range(first * tile, min((first + wide) * tile, side))


def _places(grid: Grid) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, grid))


def _windows_in_raster_order(grid: Grid, tile: Grid, window: Grid, prefix: int) -> Tensor:
    places = list(_places(grid))
    wanted = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    for row, place in enumerate(places):
        seen = [_window(*sizes) for sizes in zip(place, grid, tile, window, strict=True)]
        sees = [all(x in r for x, r in zip(other, seen, strict=True)) for other in places]
        wanted[prefix + row, prefix:] = torch.tensor(sees)
    return wanted


@pytest.mark.parametrize(
    ("grid", "tile", "window", "prefix"),
    [
        ((4, 4, 4), (2, 2, 2), (2, 2, 2), 0),  # a tile sees itself
        ((4, 6, 8), (2, 2, 2), (2, 6, 6), 3),  # odd windows, one as large as the grid
        ((6, 4, 4), (2, 2, 4), (4, 2, 4), 5),  # an even one
        ((5, 7, 3), (2, 3, 2), (2, 3, 4), 1),  # tiles that do not divide the grid
        ((1, 9, 5), (4, 4, 4), (4, 4, 8), 20),  # a tile longer than an axis
        ((4, 6, 6), (4, 6, 3), (4, 6, 3), 17),  # a tile of 72 tokens in blocks of 16
    ],
)
def test_tiles_see_their_windows(grid: Grid, tile: Grid, window: Grid, prefix: int) -> None:
    mask = tile_windows(grid, tile, window, prefix, block=(16, 32))
    order = tile_order(grid, tile, prefix)
    wanted = _windows_in_raster_order(grid, tile, window, prefix)
    _check(mask, wanted[order][:, order])
    back = order.argsort()
    assert torch.equal(mask.dense()[back][:, back], wanted)


def test_every_tile_of_a_divisible_grid_sees_as_many() -> None:
    mask = tile_windows((8, 16, 16), (2, 4, 8), (6, 12, 16))
    assert (mask.dense().sum(1) == 6 * 12 * 16).all()
    assert mask.density == 6 * 12 * 16 / (8 * 16 * 16)


@pytest.mark.parametrize("window", [(5, 7, 3), (6, 9, 4), (99, 99, 99)])
def test_a_window_as_large_as_the_grid_is_all(window: Grid) -> None:
    mask = tile_windows((5, 7, 3), (2, 3, 2), window, prefix=2)
    _check(mask, torch.ones(107, 107, dtype=torch.bool))


@pytest.mark.parametrize(
    ("grid", "tile"), [((4, 6, 8), (2, 3, 4)), ((5, 7, 3), (2, 3, 2)), ((2, 2, 2), (4, 1, 9))]
)
def test_tile_order_goes_tile_by_tile(grid: Grid, tile: Grid) -> None:
    places = list(_places(grid))
    tiles = [tuple(x // side for x, side in zip(place, tile, strict=True)) for place in places]
    wanted = sorted(range(len(places)), key=lambda i: (tiles[i], places[i]))
    assert tile_order(grid, tile).tolist() == wanted
    assert tile_order(grid, tile, prefix=3).tolist() == [0, 1, 2, *(3 + i for i in wanted)]


@pytest.mark.parametrize(
    ("tile", "block"), [((4, 8, 4), 128), ((4, 4, 4), 64), ((3, 8, 8), 64), ((2, 2, 4), 16), ((1, 4, 5), 32)]
)
def test_blocks_fit_the_tile(tile: Grid, block: int) -> None:
    assert tile_windows((8, 16, 16), tile, tile).block == (block, block)


def test_blocks_fit_the_frame() -> None:
    assert block_causal(3, 64).block == (64, 64)
    assert block_causal(3, 256).block == (128, 128)


def test_to_moves_the_lists() -> None:
    mask = packed([0, 5, 40], block=(16, 16))
    moved = mask.to("meta")
    assert moved.device == torch.device("meta")
    assert all(x.is_meta for x in (*moved.queries, *moved.keys))
    assert (moved.shape, moved.block, moved.pairs) == (mask.shape, mask.block, mask.pairs)


def test_a_default_device_is_left_alone() -> None:
    with torch.device("meta"):
        masks = [packed([0, 5, 40]), block_causal(2, 3, 1), tile_windows((4, 4, 4), (2, 2, 2), (2, 2, 4), 3)]
    assert all(mask.device == torch.device("cpu") for mask in masks)


def test_a_mask_is_told_in_a_line() -> None:
    told = repr(packed([0, 16, 48], block=(16, 32)))
    assert told == (
        "BlockMask(shape=(48, 48), block=(16, 32), density=55.56%, 3 x 2 blocks, 3 entries, device='cpu')"
    )


def test_compiled_code_reads_a_mask() -> None:
    masks = [packed([0, 5, 40], block=(16, 16)), packed([0, 20, 40], block=(16, 16))]
    scores = torch.randn(40, 40, requires_grad=True)

    def masked(mask: BlockMask, scores: Tensor) -> Tensor:
        return scores.masked_fill(~mask.dense(), 0.0).sum() * mask.block[0]

    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    for mask in masks:
        torch.testing.assert_close(compiled(mask, scores), masked(mask, scores))


_EYE = torch.eye(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: packed([1, 4]), r"cu_seqlens_q = \[1, 4\]: must begin with 0"),
        (lambda: packed([0, 4, 3]), r"cu_seqlens_q = \[0, 4, 3\]: .* ascend"),
        (lambda: packed([0]), "must begin with 0 and ascend"),
        (lambda: packed([0, 4], [0, 4, 8]), "cu_seqlens_k has 2 clips, cu_seqlens_q 1"),
        (lambda: packed([0.0, 4.0]), "integers"),  # type: ignore[list-item]
        (lambda: packed([0, 0]), r"shape = \(0, 0\)"),
        (lambda: packed([0, 2**31]), "query_lengths = 2,147,483,648 in all: .*2,147,483,647"),
        (lambda: packed([0, 4], block=(8, 16)), r"block = \(8, 16\): .*at least 16"),
        (lambda: packed([0, 4], block=(48, 16)), r"block = \(48, 16\): must be two powers of two"),
        (lambda: from_blocks([3, 3], [3, 3], _EYE.int(), (16, 16)), r"torch\.int32 .*must be bool, \(2, 2\)"),
        (lambda: from_blocks([3], [3, 3], _EYE, (16, 16)), r"must be bool, \(1, 2\)"),
        (lambda: from_blocks([3, -1], [3, 3], _EYE, (16, 16)), "query_lengths = -1"),
        (lambda: block_causal(0, 4), "frames = 0: must be at least 1"),
        (lambda: block_causal(2, 4, prefix=-1), "prefix = -1"),
        (lambda: tile_windows((4, 4), (2, 2), (2, 2)), r"grid = \(4, 4\): must be three"),  # type: ignore[arg-type]
        (lambda: tile_windows((4, 4, 4), (2, 0, 2), (2, 2, 2)), r"tile = \(2, 0, 2\)"),
        (
            lambda: tile_windows((9, 9, 9), (2, 4, 2), (2, 6, 2)),
            "window = 6 along height: .* 4 tokens.* 8 would",
        ),
        (lambda: tile_windows((9, 9, 9), (2, 4, 2), (0, 4, 2)), "window = 0 along time: .*; 2 would"),
        (lambda: tile_order((4, 4, 4), (2, 2, 2), prefix=-2), "prefix = -2"),
    ],
)
def test_mistakes_are_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


def test_the_input_cast_of_fsdp_leaves_a_mask_as_it_is() -> None:
    mask = packed([0, 5, 40], block=(16, 16))
    cast = _apply_to_tensors(lambda x: x.to(torch.bfloat16) if x.is_floating_point() else x, mask)
    assert isinstance(cast, BlockMask)
    assert isinstance(cast.queries, BlockLists)
    assert torch.equal(cast.dense(), mask.dense())
    assert (cast.shape, cast.block, cast.pairs) == (mask.shape, mask.block, mask.pairs)
