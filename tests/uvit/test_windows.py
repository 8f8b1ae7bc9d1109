"""A U-ViT that attends in windows is the plain one under the same mask, however it is run."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import uvit
from dtrain.kernels.attention import attention
from dtrain.kernels.block_mask import BlockMask
from tests.uvit.inputs import draw_inputs
from uvit.config import Grid
from uvit.embed import Layout, rope_table
from uvit.layers import Attention, Block
from uvit.windows import Windows, windows_of

_WINDOW, _TILE = (2, 2, 4), (1, 2, 2)
_CONFIG = uvit.UViTConfig(
    input_size=(4, 8, 12), patch_size=(1, 2, 2), width=32, depth=4, heads=4, window=_WINDOW, window_tile=_TILE
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class": {"condition": "class", "num_classes": 5},
    "rope": {"positions": "rope", "qk_norm": True, "condition": "text", "text_dim": 12, "text_tokens": 3},
}


def _model(**overrides: Any) -> uvit.UViT:
    torch.manual_seed(0)
    model = uvit.build(_CONFIG, **overrides)
    assert isinstance(model, uvit.UViT)
    for parameter in model.parameters():  # small weights would leave attention even and its mask unseen
        nn.init.normal_(parameter, std=0.2)
    return model


def _sees(a: int, b: int, side: int, tile: int, window: int) -> bool:
    """Along one axis of `side` patches, counted in tiles."""
    tiles = -(-side // tile)
    wide = min(window // tile, tiles) if window else tiles
    first = min(max(a // tile - wide // 2, 0), tiles - wide)
    return first <= b // tile < first + wide


def _mask_in_raster_order(extra: int, grid: Grid, tile: Grid, window: Grid) -> Tensor:
    places = list(itertools.product(*map(range, grid)))
    mask = torch.ones(extra + len(places), extra + len(places), dtype=torch.bool)
    for (row, a), (column, b) in itertools.product(enumerate(places), repeat=2):
        axes = zip(a, b, grid, tile, window, strict=True)
        mask[extra + row, extra + column] = all(_sees(*axis) for axis in axes)
    return mask


def _evaluate(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    out = model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    return out, list(torch.autograd.grad(out.sin().sum(), list(model.parameters())))


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize(
    ("size", "tile", "window"),
    [
        ((4, 8, 12), _TILE, _WINDOW),
        ((3, 10, 14), (2, 2, 3), (2, 4, 3)),  # tiles that do not divide the grid of (3, 5, 7)
        ((2, 12, 8), (1, 2, 2), (0, 2, 2)),  # all of the time axis
        ((5, 4, 4), (1, 1, 1), (3, 1, 1)),  # tiles of one patch
    ],
)
def test_it_is_the_plain_model_under_the_mask(
    options: dict[str, Any], size: Grid, tile: Grid, window: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed = _model(**options, window_tile=tile, window=window)
    inputs = draw_inputs(windowed.config, size)
    found = _evaluate(windowed, inputs)

    plain = _model(**options, window=(0, 0, 0))
    grid = size[0], size[1] // 2, size[2] // 2
    mask = _mask_in_raster_order(plain.config.extra_tokens, grid, tile, window)
    assert not mask.all()
    attend = F.scaled_dot_product_attention
    for module in plain.modules():
        if isinstance(module, Attention):
            module.attend = lambda q, k, v, **_: attend(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, _evaluate(plain, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [(4, 4, 6), (0, 4, 0), (8, 40, 6)])
def test_a_window_as_large_as_the_grid_is_none(window: Grid) -> None:
    inputs = draw_inputs(_CONFIG, size=(4, 8, 12))
    model, plain = _model(window=window, window_tile=(2, 4, 2)), _model(window=(0, 0, 0))
    assert model(**inputs).equal(plain(**inputs))
    assert windows_of((4, 4, 6), (2, 4, 2), window, 1) is None


def _pairs(config: uvit.UViTConfig, grid: Grid) -> int:
    mask = _mask_in_raster_order(config.extra_tokens, grid, config.window_tile, config.window)
    return int(mask.sum())


@pytest.mark.parametrize("size", [(4, 8, 12), (3, 10, 14)])
def test_flops_count_the_pairs_that_see_each_other(size: Grid) -> None:
    options = _OPTIONS["rope"]
    windowed, plain = _model(**options).config, _model(**options, window=(0, 0, 0)).config
    saved = uvit.token_count(plain, *size) ** 2 - _pairs(windowed, (size[0], size[1] // 2, size[2] // 2))
    assert saved > 0
    flops = [uvit.forward_flops(config, 3, *size) for config in (plain, windowed)]
    assert flops[0] - flops[1] == 3 * (_CONFIG.depth + 1) * 4 * saved * _CONFIG.width


def _made() -> Windows:
    made = windows_of((4, 4, 6), _TILE, _WINDOW, 1)
    assert made is not None
    return made


def _block() -> tuple[Block, Layout, Tensor]:
    torch.manual_seed(0)
    rope = rope_table(1, (4, 4, 6), 8, torch.device("cpu"))
    return Block(32, 4, qk_norm=True), Layout(rope, _made().mask), torch.randn(2, 97, 32, requires_grad=True)


def _gradients(run: Callable[[], Tensor], block: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(run().sin().sum(), list(block.parameters())))


def test_a_replaced_attention_gets_the_mask() -> None:
    block, layout, x = _block()
    wanted = block(x, None, layout)
    block.attn.attend = partial(attention, backend="reference")
    torch.testing.assert_close(block(x, None, layout), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_in_windows_can_be_checkpointed(reentrant: bool) -> None:
    block, layout, x = _block()
    wanted = _gradients(lambda: block(x, None, layout), block)
    checkpoint(block, x, None, layout, use_reentrant=reentrant).sin().sum().backward()
    torch.testing.assert_close([p.grad for p in block.parameters()], wanted)


def test_a_block_in_windows_compiles_as_one_graph() -> None:
    block, layout, x = _block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    unmasked = Layout(layout.rope)
    for each in (layout, unmasked):
        torch.testing.assert_close(compiled(x, None, each), block(x, None, each))
    assert not block(x, None, layout).allclose(block(x, None, unmasked))
    ours, theirs = (_gradients(lambda f=f: f(x, None, layout), block) for f in (compiled, block))
    torch.testing.assert_close(ours, theirs)


def test_a_whole_model_compiles_with_its_windows_made_outside() -> None:
    model, inputs = _model(depth=2), draw_inputs(_CONFIG, size=(4, 8, 12))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**inputs), model(**inputs))


def test_fsdp_passes_the_mask_and_the_rotations_on() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _model(positions="rope")
        seen: list[tuple[torch.dtype, BlockMask | None]] = []
        for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
            block.attn.register_forward_hook(lambda _, args, __: seen.append((args[1].cos.dtype, args[2])))
            fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=True))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
        model(**draw_inputs(_CONFIG, size=(4, 8, 12))).float().square().mean().backward()
        assert (
            seen == [(torch.float32, _made().mask)] * 5
        )  # the very object: masks are equal to themselves only
    finally:
        dist.destroy_process_group()


def test_windows_of_a_size_are_made_once() -> None:
    assert windows_of((6, 4, 6), _TILE, _WINDOW, 1) is windows_of((6, 4, 6), _TILE, _WINDOW, 1)
    assert windows_of((6, 4, 6), _TILE, _WINDOW, 2) is not windows_of((6, 4, 6), _TILE, _WINDOW, 1)


def test_windows_first_made_in_inference_mode_can_be_trained_with() -> None:
    model, inputs = _model(), draw_inputs(_CONFIG, (7, 8, 12))
    with torch.inference_mode():
        sampled = model(**inputs)
    out = model(**inputs)
    out.square().mean().backward()
    assert out.equal(sampled)


def test_fake_and_meta_networks_leave_real_windows_alone() -> None:
    size = (9, 8, 12)
    inputs, model = draw_inputs(_CONFIG, size), _model()
    with FakeTensorMode() as mode:
        fake_model = uvit.UViT(_CONFIG)
        fakes = {name: mode.from_tensor(value) for name, value in inputs.items()}
        out = fake_model(**fakes)
        assert isinstance(out, FakeTensor)
        out.square().mean().backward()
    assert out.shape == fakes["x"].shape
    meta = model.to("meta")(**{name: value.to("meta") for name, value in inputs.items()})
    assert meta.is_meta
    windows = windows_of((9, 4, 6), _TILE, _WINDOW, 1)
    assert windows is not None
    assert [type(x) for x in (windows.order, windows.back, *windows.mask.queries)] == [Tensor] * 4
    assert _model()(**inputs).shape == out.shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"window": (2, 3, 4)},
            r"window = \(2, 3, 4\): not a multiple of window_tile = \(1, 2, 2\); \(2, 4, 4\)",
        ),
        ({"window": (-1, 2, 2)}, r"window = \(-1, 2, 2\): .*\(1, 2, 2\) would be; 0 is all of an axis"),
        ({"window_tile": (1, 0, 2)}, r"window_tile = \(1, 0, 2\): every side must be positive"),
    ],
)
def test_a_wrong_window_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uvit.build(_CONFIG, **overrides)
