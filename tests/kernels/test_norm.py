"""The fused norm in Triton's interpreter, against the fp64 reference.

bf16 is left out: the interpreter adds its bit patterns.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import norm_kernels, norm_launch
from dtrain.kernels.norm import gated_add
from tests.kernels.attention_checks import DEVICE, draw, needs_triton
from tests.kernels.norm_checks import (
    BOUND,
    EVERYTHING,
    assert_exact,
    assert_same,
    draw_given,
    draw_grads,
    evaluate,
    exact,
    in_double,
)

pytestmark = needs_triton

_RESIDUALS = [(), ("branch",), ("branch", "gate")]
_SUBSETS = [s for n in range(5) for s in itertools.combinations(EVERYTHING[2:], n)]


@pytest.mark.parametrize("residual", _RESIDUALS, ids="+".join)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_each_part_alone_and_together(kind: str, residual: tuple[str, ...]) -> None:
    for names in _SUBSETS:
        if kind == "layer" or "bias" not in names:
            assert_exact(draw_given((2, 19, 24), residual + names), kind=kind)


@pytest.mark.parametrize("rows", [1, 63, 127, 129, 500])
def test_numbers_of_rows(rows: int) -> None:
    assert_exact(draw_given((2, rows, 24), dtype=torch.float16))


@pytest.mark.parametrize("width", [1, 2, 7, 8, 63, 64, 65, 129, 384, 1152])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_widths(width: int, kind: str) -> None:
    names = tuple(n for n in EVERYTHING if kind == "layer" or n != "bias")
    assert_exact(draw_given((2, 5, width), names), kind=kind, eps=0.1)


@pytest.mark.parametrize("width", [6143, 8192])
def test_wide_rows(width: int) -> None:
    assert_exact(draw_given((1, 2, width), ("branch", "gate"), torch.float16))


def test_either_output_may_lead_nowhere() -> None:
    given = draw_given((2, 19, 40))
    grads = draw_grads(given)
    for only in ("s", "y"):
        for residual in ({}, {"gate": given["gate"]}):
            part = {n: x for n, x in given.items() if n != "gate"} | residual
            assert_exact(part, {only: grads[only]})


def test_without_a_gate_both_gradients_are_one_tensor() -> None:
    given = draw_given((2, 19, 40), ("branch", "weight"))
    found = evaluate(given, draw_grads(given), backend="triton")
    assert found["grad_x"].data_ptr() == found["grad_branch"].data_ptr()
    assert "grad_y" not in found


@pytest.mark.parametrize("names", [("branch", "weight", "bias"), EVERYTHING])
@pytest.mark.parametrize(
    ("stream", "branch"), [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str
)
def test_dtypes_may_differ(names: tuple[str, ...], stream: torch.dtype, branch: torch.dtype) -> None:
    """As under autocast, where the residual stream and parameters are in fp32: also the other way round."""
    given = draw_given((2, 19, 40), names, stream, branch)
    for dtype in (None, torch.float16):
        grads = draw_grads(given) | {"y": draw(2, 19, 40, seed=8, dtype=dtype or torch.float32)}
        assert_exact(given, grads, dtype=dtype)
        found = evaluate(given, grads, backend="triton", dtype=dtype)
        assert (found["s"].dtype, found["y"].dtype) == (torch.float32, dtype or torch.float32)


def test_y_is_formed_before_s_is_rounded() -> None:
    given = draw_given((2, 37, 64), ("branch",), torch.float16)
    truth = exact(given, draw_grads(given))["y"]
    ours = evaluate(given, draw_grads(given), backend="triton")["y"]
    rounded = torch.nn.functional.layer_norm((given["x"] + given["branch"]).double(), (64,))
    assert (ours - truth).norm() < 0.8 * (rounded.half() - truth).norm()


@pytest.mark.parametrize("dims", [1, 2, 4, 5])
def test_any_number_of_dims(dims: int) -> None:
    shape = (2, 3, 2, 3, 24)[-dims:]
    names = EVERYTHING if dims > 1 else ("branch", "weight", "bias")
    assert_exact(draw_given(shape, names))


_VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows of 25": lambda x: torch.cat([x, x[..., :1]], dim=-1)[..., :24],
    "without the first token": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "columns": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("names", [("branch", "weight", "bias"), EVERYTHING])
@pytest.mark.parametrize("view", _VIEWS)
def test_any_strides(view: str, names: tuple[str, ...]) -> None:
    given = draw_given((3, 9, 24), names, torch.float16)
    grads = draw_grads(given)
    strided = {n: _VIEWS[view](x) for n, x in (given | grads).items() if x.dim() == 3}
    for name, x in strided.items():
        assert x.stride() != (given | grads)[name].stride()
        assert x.equal((given | grads)[name])
    ours = evaluate(
        {n: strided.get(n, x) for n, x in given.items()}, {n: strided[n] for n in grads}, backend="triton"
    )
    theirs = evaluate(given, grads, backend="triton")
    if (
        names != EVERYTHING
    ):  # rows that are not even are walked sample by sample, and so summed in another order
        for name in ("grad_weight", "grad_bias"):
            torch.testing.assert_close(ours.pop(name), theirs.pop(name), rtol=2e-3, atol=1e-3)
    assert_same(ours, theirs)


def test_rows_of_a_view_are_read_where_they_are() -> None:
    for x in (draw(3, 9, 24)[:, 1:], draw(9, 3, 24).transpose(0, 1), draw(2, 3, 4, 24)):
        rows = norm_launch._call((x,), ()).rows[0]
        assert rows is not None
        assert rows.data_ptr() == x.data_ptr()
        assert rows.flatten().equal(x.flatten())


@pytest.mark.parametrize("dims", [(1, 1, 1), (1, 1, 24), (3, 9, 1), (3, 1, 24)])
def test_expanded_gradients(dims: tuple[int, ...]) -> None:
    given = draw_given((3, 9, 24), dtype=torch.float16)
    grads = {n: draw(*dims, seed=s, dtype=torch.float16).expand(3, 9, 24) for n, s in (("s", 7), ("y", 8))}
    packed = {n: g.contiguous() for n, g in grads.items()}
    assert_same(evaluate(given, grads, backend="triton"), evaluate(given, packed, backend="triton"))


@pytest.mark.parametrize("form", ["(B, 1, D)", "expanded", "rows of 73", "columns"])
def test_vectors_of_samples_in_any_form(form: str) -> None:
    given = draw_given((3, 9, 24), dtype=torch.float16)
    if form == "expanded":
        given |= {n: given[n][:1].expand(3, 24) for n in ("gate", "scale", "shift")}
    changed = {
        "(B, 1, D)": lambda v: v[:, None],
        "expanded": lambda v: v,
        "rows of 73": lambda v: torch.cat([v, v, v, v[:, :1]], dim=1)[:, :24],
        "columns": lambda v: v.mT.contiguous().mT,
    }[form]
    formed = given | {n: changed(given[n]) for n in ("gate", "scale", "shift")}
    packed = {n: x.contiguous() for n, x in given.items()}
    ours = evaluate(formed, draw_grads(given), backend="triton")
    theirs = evaluate(packed, draw_grads(given), backend="triton")
    assert_same({n: x.view(theirs[n].shape) for n, x in ours.items()}, theirs)
    assert ours["grad_gate"].shape == formed["gate"].shape


def test_chunks_of_a_projection_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw_given((3, 9, 24))
    seen: list[int] = []

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **_: seen.extend(x.data_ptr() for x in args if isinstance(x, Tensor))

    monkeypatch.setattr(norm_kernels, "forward_kernel", Launched())
    with torch.no_grad():
        torch.ops.dtrain.norm(
            *(given[n] for n in ("x", "branch", "gate", "weight", "bias", "scale", "shift")),
            "layer", 1e-5, torch.float32,
        )  # fmt: skip
    assert {given[n].data_ptr() for n in ("gate", "scale", "shift")} <= set(seen)


_MARGIN = 512 * 128


def _poisoned(buffers: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    buffers.append(torch.full((size + _MARGIN,), math.nan, dtype=dtype, device=DEVICE))
    return buffers[-1][:size].view(shape)


@pytest.mark.parametrize("shape", [(2, 65, 40), (1, 1, 72), (2, 2, 1000)])
@pytest.mark.parametrize("names", [EVERYTHING, ("branch", "weight", "bias"), ("scale",)])
def test_every_element_is_written_and_none_beyond(
    shape: tuple[int, ...], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = draw_given(shape, names, torch.float16)
    grads = draw_grads(given)
    expected = evaluate(given, grads, backend="triton")
    buffers: list[Tensor] = []

    def new_empty(x: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if "device" in options:  # Triton's own
            return original(x, *size, dtype=dtype, **options)
        sizes = tuple(size[0]) if isinstance(size[0], tuple | torch.Size) else size
        return _poisoned(buffers, sizes, dtype or x.dtype)

    def empty_like(x: Tensor, *, dtype: torch.dtype | None = None, memory_format: Any = None) -> Tensor:
        return _poisoned(buffers, tuple(x.shape), dtype or x.dtype)

    original = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    found = evaluate(given, grads, backend="triton")
    monkeypatch.undo()
    assert len(buffers) > len(expected)
    assert_same(found, expected)
    for buffer in buffers:
        assert buffer[-_MARGIN:].isnan().all()
        assert not buffer[:-_MARGIN].isnan().any()


def test_large_means_and_values() -> None:
    """As exact as PyTorch where fp32 itself is not."""
    given = draw_given((2, 19, 40), ("branch", "weight"))
    grads = draw_grads(given)
    for mean, scale in ((1000.0, 1.0), (0.0, 1e-12), (0.0, 1e15)):
        large = given | {"x": mean + scale * given["x"], "branch": scale * given["branch"]}
        truth, theirs = exact(large, grads, eps=1e-30), evaluate(large, grads, eps=1e-30, backend="reference")
        for name, ours in evaluate(large, grads, eps=1e-30, backend="triton").items():
            error = (ours - truth[name]).norm()
            assert error <= 2 * (theirs[name] - truth[name]).norm() + 1e-7 * truth[name].norm(), name


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_of_zeros_give_the_bias(kind: str) -> None:
    zeros = torch.zeros(2, 19, 40, device=DEVICE)
    found = evaluate({"x": zeros, "shift": draw(2, 40)}, {"y": draw(2, 19, 40)}, kind=kind, backend="triton")
    assert found["y"].equal(draw(2, 40)[:, None].expand(2, 19, 40))
    assert found["grad_x"].isfinite().all()


def test_offsets_beyond_31_bits() -> None:
    rows, stride = 129, 2**24 + 1  # odd, so that it counts single elements
    memory = torch.empty(rows * stride, dtype=torch.float16, device=DEVICE)  # pages never touched are free
    far = memory.as_strided((1, rows, 32), (0, stride, 1))
    assert (rows - 1) * stride >= 2**31
    given = draw_given((1, rows, 32), dtype=torch.float16)
    grads = draw_grads(given)
    expected = evaluate(given, grads, backend="triton")
    for these, names in ((given, ("x", "branch")), (grads, ("s", "y"))):
        for name in names:
            far.copy_(these[name])
            moved = [other | {name: far} if other is these else other for other in (given, grads)]
            assert_same(evaluate(*moved, backend="triton"), expected)


def test_programs_depend_on_shapes_alone() -> None:
    """Enough of them for a large GPU, and not so many that their sums count."""
    rows = {n: norm_launch._rows_of_program(1, n, 1) for n in (1, 100, 512, 4096, 32768, 2**20)}
    assert rows == {1: 1, 100: 1, 512: 1, 4096: 8, 32768: 64, 2**20: 128}
    assert norm_launch._rows_of_program(256, 257, 1) == 86  # 3 programs a sample, evenly
    assert norm_launch._rows_of_program(8, 300, 4) == 4


@pytest.mark.parametrize("programs", [1, 2, 129, 300])
def test_sums_over_programs(programs: int) -> None:
    """Also more than the second kernel takes at once, by samples and over all."""
    for rows in (1, 2):
        sums = draw(3, rows * programs, 40)
        like = [draw(rows, 40), None, draw(rows, 40, dtype=torch.float16), draw(rows, 40)]
        found = norm_launch._totals(sums, like, rows)
        assert found.pop(1) is None
        for total, by_program in zip(found, sums, strict=True):
            exact_total = by_program.double().view(rows, programs, 40).sum(1)
            assert (total - exact_total).norm() < BOUND[total.dtype] * exact_total.norm()


def test_more_rows_than_a_program_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = norm_launch._launch("sm_80", 40, 8, 1).constants["ROWS"]
    monkeypatch.setattr(norm_launch, "_rows_of_program", lambda samples, rows, step: 3 * step)
    assert_exact(draw_given((2, 7 * at_once - 3, 40)))


@pytest.mark.parametrize("dtype", BOUND)
def test_gated_add(dtype: torch.dtype) -> None:
    for rows, width in ((1, 40), (67, 72)):
        given = draw_given((2, rows, width), ("branch", "gate"), dtype)
        grad = draw(2, rows, width, seed=7, dtype=dtype)
        truth = _gated_add(in_double(given), grad.double(), "reference")
        for mine, other, like in zip(
            _gated_add(given, grad, "triton"), truth, (given["x"], *given.values()), strict=True
        ):
            assert mine.dtype == like.dtype
            assert (mine - other).norm() < BOUND[dtype] * other.norm()


def _gated_add(given: dict[str, Tensor], grad: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given.values()]
    s = gated_add(*leaves, backend=backend)
    return [s, *torch.autograd.grad(s, leaves, grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 1152, 1536, 2048, 3072])
@pytest.mark.parametrize("names", [("branch", "weight", "bias"), EVERYTHING])
def test_real_sizes_in_bf16(width: int, names: tuple[str, ...]) -> None:
    """No more error than twice that of PyTorch's passes, and the same bits in every run."""
    given = draw_given((4, 4100, width), names, torch.bfloat16)
    grads = draw_grads(given)
    truth, theirs = exact(given, grads), evaluate(given, grads, backend="reference")
    ours = evaluate(given, grads, backend="triton")
    for name, value in truth.items():
        assert (ours[name] - value).norm() <= 2 * (theirs[name] - value).norm(), name
    for _ in range(5):
        assert_same(evaluate(given, grads, backend="triton"), ours)
