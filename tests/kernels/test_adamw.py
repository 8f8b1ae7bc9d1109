"""AdamW in one pass: the kernel in Triton's interpreter against its definition, bit for bit, and both against
PyTorch's.

bf16 may be tested in the interpreter here: no kernel computes in it, and what is stored needs no rounding.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import adamw_kernels
from dtrain.kernels.adamw import Hyper, Shard, adamw_, moments_bytes, update_bytes
from dtrain.kernels.adamw_reference import scalars, update
from dtrain.kernels.launch import arch_of, known_arch
from dtrain.kernels.rounding import Runs
from dtrain.optim import AdamW
from tests.kernels.adamw_checks import (
    BF16,
    FP32,
    HOW,
    assert_same,
    copy_of,
    draw_grads,
    draw_shard,
    each_backend,
    map_tensors,
    plain,
    quick_interpreter,
    triton,
)  # fmt: skip
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

__all__ = ["quick_interpreter"]
pytestmark = pytest.mark.usefixtures("quick_interpreter")

# (R, ...): whole blocks, rows that end in a block, odd ones, one element and one row.
SHAPES = [(4, 256), (3, 132), (7, 129), (2, 3, 111), (500, 128), (1, 1000)]
PLAIN_SHAPES = [*SHAPES, (1,), (63,), (129,), (500,), ()]
KINDS = list(itertools.product([FP32, BF16], [FP32, BF16], [False, True], [None, FP32, BF16]))


def steps(step: Any, shards: list[Shard], dtype: torch.dtype = FP32, count: int = 3, **options: Any) -> None:
    for number in range(1, count + 1):
        grads = draw_grads(shards, dtype, seed=10 * number)
        step(shards, grads, HOW._replace(step=number), **options)


@needs_triton
@pytest.mark.parametrize(("param", "grad", "coded", "ema"), KINDS)
def test_the_kernel_has_the_bits_of_its_definition(
    param: torch.dtype, grad: torch.dtype, coded: bool, ema: torch.dtype | None
) -> None:
    shapes = SHAPES if coded else PLAIN_SHAPES
    shards = [draw_shard(s, param, coded, ema, number=i, first_row=7 * i) for i, s in enumerate(shapes)]
    expected = [copy_of(s) for s in shards]
    steps(triton, shards, grad, seed=3, grad_scale=draw(1).abs())
    steps(plain, expected, grad, seed=3, grad_scale=draw(1).abs())
    for shape, a, b in zip(shapes, shards, expected, strict=True):
        assert_same(a, b, shape)


def with_margin(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy at an offset in a buffer that is otherwise NaN, or 255; and the buffer."""
    buffer = torch.full((x.numel() + 64,), 255 if x.dtype == torch.uint8 else math.nan, device=DEVICE).to(
        x.dtype
    )
    view = buffer[offset : offset + x.numel()].view(x.shape)
    return view.copy_(x), buffer


@needs_triton
@pytest.mark.parametrize("offset", [0, 1, 4, 32])
@pytest.mark.parametrize("coded", [False, True])
def test_any_alignment_gives_the_same_and_nothing_beyond_is_written(coded: bool, offset: int) -> None:
    for shape, dtype in itertools.product([(4, 256), (3, 132), (7, 129)], [FP32, BF16]):
        expected = draw_shard(shape, dtype, coded, dtype)
        buffers: list[Tensor] = []

        def moved(x: Tensor, buffers: list[Tensor] = buffers) -> Tensor:
            view, buffer = with_margin(x, offset)
            buffers.append(buffer)
            return view

        shard = map_tensors(moved, expected)
        steps(triton, [shard], dtype, count=2)
        steps(plain, [expected], dtype, count=2)
        assert_same(shard, expected)
        for buffer in buffers:
            size = buffer.numel() - 64
            margin = torch.cat([buffer[:offset], buffer[offset + size :]])
            assert bool((margin == 255).all() if buffer.dtype == torch.uint8 else margin.isnan().all())


@needs_triton
def test_unaligned_gradients_give_the_same() -> None:
    """FSDP2's are views into one buffer."""
    shards = [draw_shard(s, FP32, True, FP32) for s in SHAPES]
    expected = [copy_of(s) for s in shards]
    grads = draw_grads(shards, FP32, seed=1)
    flat = torch.cat([draw(1), *(g.flatten() for g in grads)])
    views = [x.view(g.shape) for x, g in zip(flat[1:].split([g.numel() for g in grads]), grads, strict=True)]
    assert any(v.data_ptr() % 16 for v in views)
    triton(shards, views, HOW)
    triton(expected, grads, HOW)
    for a, b in zip(shards, expected, strict=True):
        assert_same(a, b)


def cut(shard: Shard, ends: tuple[int, ...]) -> Iterator[Shard]:
    for start, end in itertools.pairwise((0, *ends)):
        part = map_tensors(lambda x, s=start, e=end: x[s:e].clone(), shard)
        yield part._replace(first_row=shard.first_row + start)


@each_backend
@pytest.mark.parametrize(
    ("param", "coded", "ema"), [(FP32, False, FP32), (BF16, False, BF16), (BF16, True, BF16)]
)
def test_a_parameter_may_be_cut_anywhere(
    step: Any, param: torch.dtype, coded: bool, ema: torch.dtype
) -> None:
    for shape in [(11, 130), (11, 256), *([] if coded else [(1000,), (11, 3)])]:
        whole = draw_shard(shape, param, coded, ema, first_row=5, number=2)
        ends = (1, 1, shape[0] // 2 + 2, shape[0])  # uneven, and an empty one
        parts = list(cut(whole, ends))
        for number in (1, 2):
            (grad,) = draw_grads([whole], FP32, seed=number)
            step([whole], [grad], HOW._replace(step=number), seed=4)
            grads = [grad[s:e] for s, e in itertools.pairwise((0, *ends))]
            step(parts, grads, HOW._replace(step=number), seed=4)
        for name, x in whole._asdict().items():
            if isinstance(x, Tensor):
                assert torch.cat([getattr(p, name) for p in parts]).equal(x), name


@each_backend
@pytest.mark.parametrize("ema", [FP32, BF16])
def test_without_codes_it_may_be_cut_along_any_dim(step: Any, ema: torch.dtype) -> None:
    """Also in the middle of a counter's four words, and of what is updated at a time."""
    cuts = [((1, 6, 200), 1, 2), ((1, 1100, 130), 2, 65), ((3, 7, 50), 2, 10), ((7, 9), 1, 1)]
    for shape, dim, size in cuts:
        whole = draw_shard(shape, BF16, False, ema, number=2)
        inner = math.prod(shape[dim + 1 :])
        parts = [
            map_tensors(lambda x, d=dim, i=i, n=size: x.narrow(d, i, n).clone(), whole)._replace(
                runs=Runs(i * inner, size * inner, shape[dim] * inner)
            )
            for i in range(0, shape[dim], size)
        ]
        (grad,) = draw_grads([whole], FP32, seed=1)
        step([whole], [grad], HOW, seed=4)
        step(parts, [g.contiguous() for g in grad.split(size, dim)], HOW, seed=4)
        for name, x in whole._asdict().items():
            if isinstance(x, Tensor):
                assert torch.cat([getattr(p, name) for p in parts], dim).equal(x), (shape, name)


@needs_triton
def test_results_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tile in (adamw_kernels._Tile(4, 16), adamw_kernels._Tile(64, 1), adamw_kernels._Tile(1, 3)):
        monkeypatch.setattr(adamw_kernels, "_TILES", dict.fromkeys(adamw_kernels._TILES, tile))
        shards = [draw_shard((9, 200), BF16, True, BF16), draw_shard((900,), BF16, False, BF16, first_row=3)]
        steps(triton, shards, count=2)
        results.append(shards)
    for shards in results[1:]:
        for a, b in zip(results[0], shards, strict=True):
            assert_same(a, b)


@needs_triton
def test_one_launch_a_kind_and_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            launched.append(grid[0])
            return kernel[grid]

    kernel = adamw_kernels._update_kernel
    monkeypatch.setattr(adamw_kernels, "_update_kernel", Counted())
    adamw_kernels._launches.cache_clear()
    shards = [draw_shard((40, 256), coded=i % 2 == 0) for i in range(6)] + [draw_shard((33,))]
    for number in (1, 2, 3):
        grads = draw_grads(shards, FP32, seed=number)
        triton(shards, grads, HOW._replace(step=number, lr=1e-3 * number))
    tile = adamw_kernels._TILES[known_arch(arch_of(DEVICE))]
    three = 3 * math.ceil(40 * 2 / (tile.blocks * tile.repeats))
    assert launched == [three, three, 1] * 3  # codes, fp32, and a row of 33 that is not aligned
    assert adamw_kernels._launches.cache_info()[:2] == (2, 1)


@needs_triton
def test_offsets_beyond_two_to_the_31() -> None:
    """Of the last rows alone, by a table whose first program is one of the last; the rest stays untouched."""
    rows, row, device = 2**20 + 64, 2048, torch.device("cpu")
    if DEVICE.type != "cpu":
        pytest.skip("untouched pages are free on the CPU only")
    scale = [torch.empty(rows, row // 128, dtype=BF16) for _ in range(2)]
    whole = Shard(
        torch.empty(rows, row, dtype=BF16),
        *(torch.empty(rows, row, dtype=torch.uint8) for _ in range(2)),
        *scale,
    )
    grad = torch.empty(rows, row, dtype=BF16)
    tile = adamw_kernels._TILES[known_arch(arch_of(device))]
    per_program = tile.blocks * tile.repeats
    last = per_program * 128 // row
    (grad[-last:],) = draw_grads([draw_shard((last, row))], BF16, seed=1)
    small = draw_shard((last, row), BF16, True, first_row=rows - last)
    for x, y in zip(whole[:5], small[:5], strict=True):
        x[-last:] = y
    place = adamw_kernels._place(whole, grad)
    _, table, owners = adamw_kernels._launch(place.kind, {0: place}, per_program, device)
    table[0, adamw_kernels._Line._fields.index("first_program")] = 1 - len(owners)
    calls = torch.tensor([[grad.data_ptr(), 5]])
    adamw_kernels._update_kernel[(1,)](
        table, calls, owners, None, *scalars(HOW), **adamw_kernels._constants(place.kind, tile)
    )
    update(small, grad[-last:], scalars(HOW), seed=5)
    for x, y in zip(whole[:5], small[:5], strict=True):
        assert x[-last:].equal(y)


@each_backend
def test_fp32_is_pytorchs(step: Any) -> None:
    """Against fp64, with clipping and averages."""
    shards = [draw_shard((5, 130), ema=FP32), draw_shard((77,), ema=FP32)]
    exact = [s.param.double().requires_grad_() for s in shards]
    averages = [s.ema.double() for s in shards]
    scale = torch.tensor(0.25, device=DEVICE)
    optimizer = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for number in range(1, 11):
        grads = [draw(*s.param.shape, seed=number) for s in shards]
        for parameter, grad in zip(exact, grads, strict=True):
            parameter.grad = grad.double() * 0.25
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in exact], 0.1)
        step(shards, grads, HOW._replace(step=number), grad_scale=scale)
    for shard, parameter, average in zip(shards, exact, averages, strict=True):
        torch.testing.assert_close(shard.param.double(), parameter.detach(), rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(shard.ema.double(), average, rtol=3e-7, atol=3e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][name]
            torch.testing.assert_close(getattr(shard, name).double(), state, rtol=2e-6, atol=1e-8)


@needs_triton
def test_the_optimizer_on_the_kernel_follows_pytorchs() -> None:
    """50 steps with groups, warm-up, clipping and gradients that are not always there."""
    shapes = [(6, 40), (40,), (3, 130)]

    def build(optimizer: Any, **options: Any) -> tuple[list[Any], Any]:
        parameters = [torch.nn.Parameter(draw(*s, seed=i)) for i, s in enumerate(shapes)]
        groups = [{"params": parameters[:2], "weight_decay": 0.0}, {"params": parameters[2:]}]
        return parameters, optimizer(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)

    ours, optimizer = build(AdamW, backend="triton")
    theirs, reference = build(torch.optim.AdamW)
    for number in range(50):
        coefficient = torch.tensor(0.5 + number / 100, device=DEVICE)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            grad = draw(*a.shape, seed=100 + 3 * number + i)
            absent = i == number % 4
            a.grad, b.grad = (None, None) if absent else (grad, grad * coefficient)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 * min(1.0, (number + 1) / 20)
        optimizer.step(grad_scale=coefficient)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_backend
def test_bf16_weights_and_averages_are_right_on_average(step: Any) -> None:
    """Steps and weights far below bf16's own: they would vanish, rounded to nearest."""
    n = 2**15
    param = torch.full((n,), 1.0, device=DEVICE)
    shard = draw_shard((n,), BF16, ema=BF16)
    shard.param.copy_(param)
    shard.ema.copy_(0.5 * param)  # type: ignore[union-attr]
    grad = torch.full((n,), 1.0, device=DEVICE)
    count = 4
    for number in range(1, count + 1):
        step([shard], [grad], Hyper(1e-4, 0.9, 0.99, 1e-8, 0.0, number, ema_weight=1e-4), seed=1)
    wanted = 1 - count * 1e-4
    assert abs(float(shard.param.double().mean()) - wanted) < 5 * math.sqrt(count * 4e-4 * 2**-8 / n)
    average = float(shard.ema.double().mean()) - 0.5  # type: ignore[union-attr]
    assert abs(average - count * 0.5e-4) < 5 * math.sqrt(count * 0.5e-4 * 2**-8 / n) + 1e-7
    correlation = torch.corrcoef(torch.stack([shard.param.float(), shard.ema.float()]))[0, 1]  # type: ignore[union-attr]
    assert abs(float(correlation)) < 5 / math.sqrt(n)


@each_backend
def test_weights_and_averages_that_share_a_word_are_rounded_independently(step: Any) -> None:
    """Both come to lie half way between two numbers of bf16."""
    n = 2**16
    shard = draw_shard((n,), BF16, ema=BF16)
    shard.param.fill_(1.0)
    shard.ema.fill_(0.5)  # type: ignore[union-attr]
    ones = torch.ones(n, device=DEVICE)
    step([shard], [ones], Hyper(2.0**-9, 0.9, 0.99, 0.0, 0.0, step=1, ema_weight=2.0**-8), seed=1)
    up = [shard.param.float() - (1 - 2.0**-9) > 0, shard.ema.float() - (0.5 + 2.0**-9) > 0]  # type: ignore[union-attr]
    assert all(abs(float(x.double().mean()) - 0.5) < 0.02 for x in up)
    assert abs(float(torch.corrcoef(torch.stack(up).double())[0, 1])) < 5 / math.sqrt(n)


@each_backend
def test_averages_take_in_weights_as_they_are_kept(step: Any) -> None:
    shard = draw_shard((500,), BF16, ema=FP32)
    step([shard], [draw(500)], HOW._replace(ema_weight=1.0))
    torch.testing.assert_close(shard.ema, shard.param.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("param", "grad", "coded", "ema"), KINDS)
def test_the_formula_counts_the_tensors_bytes(
    param: torch.dtype, grad: torch.dtype, coded: bool, ema: torch.dtype | None
) -> None:
    shard = draw_shard((7, 300), param, coded, ema)
    sizes = {n: x.numel() * x.element_size() for n, x in shard._asdict().items() if isinstance(x, Tensor)}
    moved = 2 * sum(sizes.values()) + shard.param.numel() * grad.itemsize
    assert update_bytes(7, 300, param=param, grad=grad, coded=coded, ema=ema) == moved
    assert moments_bytes(7, 300, coded) == sum(size for n, size in sizes.items() if n.startswith("exp_avg"))


def test_the_bytes_of_an_element() -> None:
    element = functools.partial(update_bytes, 1, 128)
    assert [element() / 128, element(ema=FP32) / 128] == [28, 36]
    assert element(coded=True) == 128 * 16 + 8
    assert element(coded=True, param=BF16, grad=BF16, ema=BF16) == 128 * 14 + 8


def test_gradients_with_other_strides_and_empty_shards() -> None:
    shards = [draw_shard((6, 130), coded=True), draw_shard((0, 130), coded=True), draw_shard((0,))]
    expected = copy_of(shards[0])
    grad = draw(130, 6).t()
    adamw_(shards, [grad, draw(0, 130), draw(0)], HOW)
    adamw_([expected], [grad.contiguous()], HOW)
    assert_same(shards[0], expected)
    adamw_([], [], HOW)
    expanded = draw_shard((6, 130))
    adamw_([expanded], [draw(1).expand(6, 130)], HOW)
    assert expanded.exp_avg.unique().numel() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"exp_avg": torch.zeros(3, 2, device=DEVICE)},
            r"exp_avg \(3, 2\): must have param's shape, \(2, 256\)",
        ),
        (
            {"param": torch.zeros(2, 256, device=DEVICE, dtype=torch.float16)},
            r"param has dtype torch.float16",
        ),
        (
            {"ema": torch.zeros(256, 2, device=DEVICE).t()},
            r"ema \(2, 256\) with strides .* must be contiguous",
        ),
        (
            {"exp_avg_sq": torch.zeros(2, 256, device=DEVICE)},
            r"exp_avg_sq has dtype torch.float32: must be torch.uint8",
        ),
        ({"runs": Runs(0, 256, 512)}, r"codes with Runs\(first=0, .* need consecutive rows"),
        ({"exp_avg_scale": None}, r"exp_avg_scale None: must be contiguous \(2, 2\) torch.bfloat16"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    shard = draw_shard((2, 256), coded=True)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        adamw_([shard], [draw(2, 256)], HOW)


def test_backends_are_checked() -> None:
    with pytest.raises(ValueError, match="backend = 'cuda': must be one of"):
        adamw_([draw_shard((4,))], [draw(4)], HOW, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(("param", "grad", "coded", "ema"), KINDS)
def test_a_gpu_has_the_bits_of_the_definition(
    param: torch.dtype, grad: torch.dtype, coded: bool, ema: torch.dtype | None
) -> None:
    shards = [draw_shard((s, 1152), param, coded, ema, first_row=9, number=s) for s in (1, 500, 1537)]
    expected = [copy_of(s) for s in shards]
    again = [copy_of(s) for s in shards]
    steps(adamw_, shards, grad, seed=3)
    steps(adamw_, again, grad, seed=3)
    steps(plain, expected, grad, seed=3)
    for a, b, c in zip(shards, again, expected, strict=True):
        assert_same(a, b)
        assert_same(a, c)
