"""The MLP in one piece and in several, on PyTorch's passes and, in Triton's interpreter, on the kernels."""

import functools
import gc
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from dtrain.kernels import chunked_mlp, gelu_kernels, gelu_linear
from dtrain.kernels.mlp import mlp
from tests.kernels.attention_checks import DEVICE, draw
from tests.kernels.products import declared_flops, performed_flops
from tests.kernels.test_gelu import (
    APPROXIMATE,
    BACKENDS,
    OPS,
    assert_exact,
    assert_same,
    evaluate,
    needs_triton,
    widen,
)

plain = functools.partial(mlp, backend="reference")
NAMES = ("x", "w1", "b1", "w2", "b2")
CHUNKS = [1, 2, 3, 50]


def draw_inputs(
    rows: int = 37,
    width: int = 16,
    hidden: int = 40,
    out: int = 12,
    dtype: torch.dtype = torch.float32,
    biases: torch.dtype | None = None,
    parts: tuple[bool, bool] = (True, True),
) -> dict[str, Any]:
    return {
        "x": draw(rows, width, dtype=dtype),
        "w1": draw(hidden, width, seed=1, dtype=dtype, scale=width**-0.5),
        "b1": draw(hidden, seed=2, dtype=biases or dtype) if parts[0] else None,
        "w2": draw(out, hidden, seed=3, dtype=dtype, scale=hidden**-0.5),
        "b2": draw(out, seed=4, dtype=biases or dtype) if parts[1] else None,
    }


def draw_grad(rows: int = 37, out: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(rows, out, seed=7, dtype=dtype)


def assert_mlp(inputs: dict[str, Any], grad: Tensor, **options: Any) -> None:
    """Output and gradients are those of the definition in fp64."""
    approximate = {"approximate": options.get("approximate", "none")}
    exact = evaluate(plain, widen(inputs), grad.double(), **approximate)
    assert_exact(evaluate(mlp, inputs, grad, **options), exact, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_each_part_alone_and_together(
    approximate: str, parts: tuple[bool, bool], chunks: int, backend: str
) -> None:
    inputs = draw_inputs(parts=parts)
    assert_mlp(inputs, draw_grad(), approximate=approximate, chunks=chunks, backend=backend)


@needs_triton
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("biases", [torch.float16, torch.float32])
def test_fp16_by_the_kernels(biases: torch.dtype, chunks: int) -> None:
    inputs = draw_inputs(127, 32, 272, 24, torch.float16, biases)
    exact = evaluate(plain, widen(inputs), draw_grad(127, 24).double())
    ours = evaluate(mlp, inputs, draw_grad(127, 24).half(), chunks=chunks, backend="triton")
    for name, x in ours.items():
        assert (x.double() - exact[name]).norm() < 1e-3 * exact[name].norm(), name
        assert x.dtype == (biases if name.removeprefix("grad_") in ("b1", "b2") else torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dims", [(37,), (2, 19)])
def test_on_a_cpu_it_is_pytorchs_own_bit_by_bit(
    dims: tuple[int, ...], autocast: bool, dtype: torch.dtype
) -> None:
    inputs = {name: x.cpu() for name, x in draw_inputs(1, 32, 64, 32, dtype).items()}
    inputs["x"] = draw(*dims, 32, dtype=dtype).cpu()
    grad = draw(*dims, 32, seed=7).cpu()

    def pytorch(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low = torch.bfloat16 if autocast else dtype
        theirs = evaluate(pytorch, inputs, grad.to(low))
        ours = evaluate(mlp, inputs, grad.to(low))
        pieces = evaluate(mlp, inputs, grad.to(low), chunks=2)
    if autocast:  # ours sums the last bias' gradient in fp32 as it goes
        torch.testing.assert_close(ours.pop("grad_b2"), theirs.pop("grad_b2"), atol=0.05, rtol=0)
    assert_same(ours, theirs)
    assert pieces["out"].equal(theirs["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_wider_biases(chunks: int, backend: str) -> None:
    inputs = draw_inputs(dtype=torch.float32, biases=torch.float64)
    assert_mlp(inputs, draw_grad(), chunks=chunks, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dims", [(16,), (0, 16), (2, 0, 16), (2, 3, 2, 16)])
def test_any_dims_and_no_rows(dims: tuple[int, ...], chunks: int, backend: str) -> None:
    inputs = draw_inputs() | {"x": draw(*dims)}
    grad = draw(*dims[:-1], 12, seed=7)
    assert_mlp(inputs, grad, chunks=chunks, backend=backend)
    assert mlp(**inputs, chunks=chunks, backend=backend).shape == grad.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("expanded", [(1, 1), (1, 12), (37, 1)])
def test_any_strides(expanded: tuple[int, int], chunks: int, backend: str) -> None:
    inputs = draw_inputs() | {"x": draw(16, 37).t()}
    inputs["w1"], inputs["w2"] = inputs["w1"].t().contiguous().t(), inputs["w2"].t().contiguous().t()
    assert_mlp(inputs, draw(*expanded, seed=7).expand(37, 12), chunks=chunks, backend=backend)


# Products of 2·R·D·H FLOPs: three forwards and backwards, with pre formed again for whatever needs it.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wanted", "first", "second"),
    [(NAMES, 4, 3), ("x", 3, 2), ("w1", 3, 2), ("b1", 2, 2), ("w2", 2, 2), ("b2", 1, 1)],
)
def test_in_pieces_only_what_is_asked_for_is_computed(
    wanted: str | tuple[str, ...], first: int, second: int, backend: str
) -> None:
    inputs, grad = draw_inputs(), draw_grad()
    names = (wanted,) if isinstance(wanted, str) else wanted
    every = evaluate(mlp, inputs, grad, chunks=3, backend=backend)
    leaves = [inputs[name].requires_grad_() for name in names]
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(mlp(**inputs, chunks=3, backend=backend), leaves, grad)
    assert all(g.equal(every[f"grad_{name}"]) for name, g in zip(names, found, strict=True))
    assert counter.get_total_flops() == 2 * 37 * 40 * (first * 16 + second * 12)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5)))
def test_declared_flops_are_those_of_the_products(needs: tuple[bool, ...], fused: bool) -> None:
    how = (*draw_inputs().values(), "none", 3, fused)
    operator, backward = chunked_mlp.chunked_mlp, chunked_mlp._backward
    assert declared_flops(operator, *how) == performed_flops(operator, *how)
    call = (backward, draw_grad(), *how, needs)
    assert declared_flops(*call) == performed_flops(*call)


@pytest.mark.parametrize(("chunks", "recomputed"), [(1, 0), (2, 1), (50, 1)])
def test_flops_are_three_times_the_forward_and_the_recomputed_product(chunks: int, recomputed: int) -> None:
    inputs, grad = draw_inputs(), draw_grad()
    with FlopCounterMode(display=False) as counter:
        evaluate(mlp, inputs, grad, chunks=chunks)
    first, second = 2 * 37 * 40 * 16, 2 * 37 * 40 * 12
    assert counter.get_total_flops() == 3 * (first + second) + recomputed * first


@pytest.mark.parametrize(("chunks", "name"), [(1, "gelu_linear"), (3, "chunked_mlp")])
@pytest.mark.parametrize("watched", [False, True])
def test_a_recomputation_ends_in_front_of_it(
    chunks: int, name: str, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a region ends with an MLP, its last operator runs once, whether or not a mode looks on."""
    operator = {"gelu_linear": gelu_linear.gelu_linear_op, "chunked_mlp": chunked_mlp.chunked_mlp}[name]
    inputs, grad = {n: x.requires_grad_() for n, x in draw_inputs(out=16).items()}, draw_grad(out=16)
    leaves = list(inputs.values())
    wanted = torch.autograd.grad(mlp(**inputs, chunks=chunks) + inputs["x"], leaves, grad)
    calls = []
    kernel = operator._kernels[DEVICE.type]
    monkeypatch.setitem(operator._kernels, DEVICE.type, lambda *args: calls.append(name) or kernel(*args))

    def block(x: Tensor, *others: Tensor) -> Tensor:
        return x + mlp(x, *others, chunks=chunks)

    with FlopCounterMode(display=False) if watched else nullcontext() as counter:
        found = torch.autograd.grad(checkpoint(block, *leaves, use_reentrant=False), leaves, grad)
    assert all(map(torch.equal, found, wanted))
    if counter is None:
        assert calls == [name]
    else:
        product = 2 * 37 * 40 * 16
        assert counter.get_total_flops() == (2 + 1 + 4) * product


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept(autocast: bool, chunks: int) -> None:
    """x and the first product, or x alone, beside parameters, of which the operators keep no cast copy."""
    inputs = {name: x.requires_grad_() for name, x in draw_inputs().items()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x
        return x

    with (
        torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        mlp(**inputs, chunks=chunks)
    given = {x.data_ptr() for x in inputs.values()}
    others = sorted(x.numel() for p, x in kept.items() if p not in given)
    x, pre, w1 = 37 * 16, 37 * 40, 16 * 40
    expected = [pre] if chunks == 1 else []
    if autocast:  # in one piece, F.linear keeps what it cast of the first product
        expected += [x, w1] if chunks == 1 else [x]
    assert others == sorted(expected)


@pytest.fixture
def tidy_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter leaves cycles behind that hold the kernels' tensors: they go at once."""

    def tidy(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            gc.collect()
            return result

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(gelu_kernels, name, tidy(getattr(gelu_kernels, name)))
    gc.freeze()  # or every collection would walk through all that was imported
    yield
    gc.unfreeze()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
@pytest.mark.usefixtures("tidy_interpreter")
@pytest.mark.parametrize(
    ("backend", "chunks"),
    [
        *(("auto", chunks) for chunks in (2, 3, 64, 300)),
        *(pytest.param("triton", chunks, marks=needs_triton) for chunks in (2, 3)),
    ],
)
def test_peak_is_two_pieces_of_the_hidden_layer(chunks: int, backend: str) -> None:
    """Forward and backward together, to the byte; 256 rows, which 3 pieces do not divide."""
    rows, width, hidden = 256, 32, 192
    inputs = {name: x.requires_grad_() for name, x in draw_inputs(rows, width, hidden, width).items()}
    grad = draw_grad(rows, width)

    def step() -> None:
        torch.autograd.grad(mlp(**inputs, chunks=chunks, backend=backend), list(inputs.values()), grad)

    step()  # the first call of a kernel keeps memory
    piece = -(-rows // chunks)
    out = grad_x = rows * width
    sums = 2 * width * hidden + hidden
    of_piece = hidden  # b1's gradient by one piece, beside its sums by programs
    if backend == "triton":
        of_piece += gelu_kernels.partial_sums(piece, "sm_80") * hidden
    assert peak_bytes(step) == 4 * (2 * piece * hidden + out + grad_x + sums + of_piece)


def test_in_one_piece_the_peak_falls_by_the_activation() -> None:
    rows, width, hidden = 256, 32, 192
    inputs = {name: x.cpu().requires_grad_() for name, x in draw_inputs(rows, width, hidden, width).items()}
    grad = draw_grad(rows, width).cpu()

    def peak(function: Any) -> int:
        return peak_bytes(lambda: torch.autograd.grad(function(**inputs), list(inputs.values()), grad))

    assert peak(plain) - peak(mlp) == 4 * rows * hidden


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("parts", [(True, True), (False, False)])
def test_gradients_are_the_functions_own(parts: tuple[bool, bool], approximate: str, chunks: int) -> None:
    inputs = draw_inputs(5, 3, 4, 2, torch.float64, parts=parts)
    leaves = [None if x is None else x.cpu().requires_grad_() for x in inputs.values()]
    function = functools.partial(mlp, approximate=approximate, chunks=chunks)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("parts", [(True, True), (False, False)])
def test_the_operator_keeps_its_promises(parts: tuple[bool, bool], fused: bool) -> None:
    inputs = draw_inputs(10, parts=parts)
    inputs["x"] = inputs["x"].view(2, 5, 16)
    leaves = [x if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(OPS.chunked_mlp, (*leaves, "none", 3, fused))
    with torch.no_grad():
        needs = [True, False, parts[0], True, parts[1]]
        how = (draw(2, 5, 12), *leaves, "tanh", 3, fused, needs)
        torch.library.opcheck(OPS.chunked_mlp_backward, how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_it_compiles_as_one_graph(chunks: int, backend: str) -> None:
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    ours = evaluate(compiled, draw_inputs(), draw_grad(), chunks=chunks, backend=backend)
    assert_same(ours, evaluate(mlp, draw_inputs(), draw_grad(), chunks=chunks, backend=backend))


@pytest.mark.parametrize("chunks", [1, 8])
def test_autocast_keeps_parameters_in_fp32(chunks: int) -> None:
    inputs, grad = draw_inputs(128, 64, 256, 64), draw_grad(128, 64)
    exact = evaluate(plain, widen(inputs), grad.double())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = evaluate(mlp, inputs, grad.bfloat16(), chunks=chunks)
    for name, x in ours.items():
        assert x.dtype == (torch.bfloat16 if name == "out" else torch.float32)
        assert (x.double() - exact[name]).norm() < 1e-2 * exact[name].norm(), name
    for name in ("grad_w1", "grad_w2"):  # in pieces their sum has more digits than bf16
        assert ours[name].bfloat16().equal(ours[name]) == (chunks == 1)


def test_sums_over_pieces_cost_the_rounding_that_is_said() -> None:
    """bf16 parameters: √chunks roundings of 2⁻⁹ at most, here 16 pieces."""
    inputs, grad = draw_inputs(128, 64, 256, 64, torch.bfloat16), draw_grad(128, 64).bfloat16()
    exact = evaluate(plain, widen(inputs), grad.double())
    for chunks in (1, 16):
        ours = evaluate(mlp, inputs, grad, chunks=chunks)
        for name in ("grad_w1", "grad_w2"):
            error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
            assert error < chunks**0.5 * 2**-8, (chunks, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": (40, 15)}, r"w1 \(40, 15\): must be \(E, 16\), a column for each input"),
        ({"b1": (16,)}, r"b1 \(16,\): must be \(40,\), one for each output of w1"),
        ({"w2": (12, 41)}, r"w2 \(12, 41\): must be \(E, 40\)"),
        ({"b2": (13,)}, r"b2 \(13,\): must be \(12,\)"),
    ],
)
def test_mistakes_are_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(**draw_inputs() | {name: draw(*shape) for name, shape in changes.items()})


def test_mixed_dtypes_and_no_pieces_are_named() -> None:
    inputs = draw_inputs()
    with pytest.raises(ValueError, match=r"w2 has dtype torch\.float64, x torch\.float32"):
        mlp(**inputs | {"w2": inputs["w2"].double()})
    with pytest.raises(ValueError, match=r"b1 has dtype torch\.float16, .*: must be that or wider"):
        mlp(**inputs | {"b1": inputs["b1"].half()})
    with pytest.raises(ValueError, match="chunks = 0: must be at least 1"):
        mlp(**inputs, chunks=0)


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [1, 4])
def test_real_sizes_in_bf16(chunks: int) -> None:
    inputs = draw_inputs(4100, 1152, 4608, 1152, torch.bfloat16)
    grad = draw_grad(4100, 1152).bfloat16()
    exact = evaluate(plain, widen(inputs), grad.double())
    theirs, ours = evaluate(plain, inputs, grad), evaluate(mlp, inputs, grad, chunks=chunks)
    for name, truth in exact.items():
        assert (ours[name] - truth).norm() <= 2 * (theirs[name] - truth).norm(), name
    for _ in range(5):
        assert_same(evaluate(mlp, inputs, grad, chunks=chunks), ours)
