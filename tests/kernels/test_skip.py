"""The linear layer that joins a block's input with its long skip, as an operator."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import peak_bytes
from dtrain.kernels import reference
from dtrain.kernels import skip as module
from dtrain.kernels.skip import skip_linear
from tests.kernels.attention_checks import DEVICE, draw
from tests.kernels.products import declared_flops, performed_flops

OPS = torch.ops.dtrain
NAMES = ("x", "skip", "weight", "bias")


def draw_inputs(
    *dims: int, width: int = 24, skip: int = 24, out: int = 20, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, skip, weight, bias."""
    return [
        draw(*dims, width, dtype=dtype),
        draw(*dims, skip, seed=1, dtype=dtype),
        draw(out, width + skip, seed=2, dtype=dtype, scale=(width + skip) ** -0.5),
        draw(out, seed=3, dtype=dtype),
    ]


def concatenated(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def evaluate(function: Any, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output, and the gradient by every tensor that there is."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


def assert_exact(ours: list[Tensor], inputs: list[Tensor | None], grad: Tensor, bound: float = 1e-6) -> None:
    wide = [None if x is None else x.double() for x in inputs]
    for mine, truth in zip(ours, evaluate(concatenated, wide, grad.double()), strict=True):
        assert mine.shape == truth.shape
        assert (mine.double() - truth).norm() <= bound * truth.norm().clamp(min=1)


@pytest.mark.parametrize("function", [skip_linear, reference.skip_linear])
@pytest.mark.parametrize("dims", [(), (1,), (37,), (2, 3, 7), (0,), (2, 0)])
@pytest.mark.parametrize("skip", [24, 8, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_linear_of_the_concatenation(
    biased: bool, skip: int, dims: tuple[int, ...], function: Any
) -> None:
    inputs: list[Tensor | None] = [*draw_inputs(*dims, skip=skip)]
    inputs[-1] = inputs[-1] if biased else None
    grad = draw(*dims, 20, seed=7)
    assert_exact(evaluate(function, inputs, grad), inputs, grad)


@pytest.mark.parametrize("expanded", [(1, 1, 1), (1, 7, 20), (3, 1, 1)])
def test_any_strides(expanded: tuple[int, ...]) -> None:
    x, skip, weight, bias = draw_inputs(3, 7)
    x, skip = x.mT.contiguous().mT, skip.repeat_interleave(2, dim=1)[:, ::2]
    strided = [x, skip, weight.t().contiguous().t(), bias]
    grad = draw(*expanded, seed=7).expand(3, 7, 20)
    assert_exact(evaluate(skip_linear, [*strided], grad), [*strided], grad)


def test_gradients_are_the_functions_own() -> None:
    inputs = draw_inputs(2, 3, width=4, skip=3, out=5, dtype=torch.float64)
    leaves = [x.cpu().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(skip_linear, leaves)
    assert torch.autograd.gradcheck(lambda *x: skip_linear(*x, None), leaves[:3])


def test_no_gradient_shares_memory_with_another() -> None:
    inputs = draw_inputs(37)
    _, *grads = evaluate(skip_linear, [*inputs], draw(37, 20))
    for grad in grads:
        assert grad.is_contiguous()
        assert grad.untyped_storage().nbytes() == grad.nbytes
    assert len({grad.data_ptr() for grad in grads}) == 4


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations")
@pytest.mark.parametrize("rows", [8, 256])
def test_the_peak_has_no_concatenation_and_no_hidden_copy(rows: int) -> None:
    """Every byte is the output's or a gradient's: products write to halves of the weight's gradient."""
    inputs = [x.requires_grad_() for x in draw_inputs(rows, width=64, skip=48, out=40)]
    grad = draw(rows, 40)
    with torch.no_grad():
        assert peak_bytes(lambda: skip_linear(*inputs)) == grad.nbytes
    expected = grad.nbytes + sum(x.nbytes for x in inputs)
    assert peak_bytes(lambda: torch.autograd.grad(skip_linear(*inputs), inputs, grad)) == expected
    plain = peak_bytes(lambda: torch.autograd.grad(concatenated(*inputs), inputs, grad))
    assert plain >= expected + 4 * rows * (64 + 48)  # the concatenation


def test_it_keeps_its_inputs_and_nothing_else() -> None:
    inputs, kept = draw_inputs(37), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        skip_linear(*(x.requires_grad_() for x in inputs))
    assert set(kept) == {x.data_ptr() for x in inputs}


@pytest.mark.parametrize(
    ("wanted", "columns"), [("x", 24), ("skip", 8), ("weight", 32), ("bias", 0), (NAMES, 64)]
)
def test_only_what_is_asked_for_is_computed(wanted: str | tuple[str, ...], columns: int) -> None:
    inputs, grad = draw_inputs(37, skip=8), draw(37, 20, seed=7)
    every = dict(zip(NAMES, evaluate(skip_linear, [*inputs], grad)[1:], strict=True))
    names = (wanted,) if isinstance(wanted, str) else wanted
    leaves = [inputs[NAMES.index(name)].requires_grad_() for name in names]
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(skip_linear(*inputs), leaves, grad)
    assert all(g.equal(every[name]) for name, g in zip(names, found, strict=True))
    assert counter.get_total_flops() == 2 * 37 * 20 * (32 + columns)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_declared_flops_are_those_of_the_products(needs: tuple[bool, ...]) -> None:
    inputs = draw_inputs(37, skip=8)
    assert declared_flops(module._forward, *inputs) == performed_flops(module._forward, *inputs)
    call = (module._backward, draw(37, 20), *inputs, needs)
    assert declared_flops(*call) == performed_flops(*call)


def test_flops_are_those_of_the_concatenation() -> None:
    inputs, grad = draw_inputs(37), draw(37, 20)
    counted = []
    for function in (skip_linear, concatenated):
        with FlopCounterMode(display=False) as counter:
            evaluate(function, [*inputs], grad)
        counted.append(counter.get_total_flops())
    assert counted == [12 * 37 * 24 * 20] * 2


@pytest.mark.parametrize("biased", [True, False])
def test_operators_keep_their_promises(biased: bool) -> None:
    leaves = [x.requires_grad_() for x in draw_inputs(2, 5, skip=8)]
    leaves[-1] = leaves[-1] if biased else None
    torch.library.opcheck(OPS.skip_linear, (*leaves,))
    with torch.no_grad():
        for needs in ([True, True, True, biased], [False, True, False, False]):
            torch.library.opcheck(OPS.skip_linear_backward, (draw(2, 5, 20), *leaves, needs))


def test_it_compiles_as_one_graph() -> None:
    inputs, grad = draw_inputs(2, 7), draw(2, 7, 20)
    compiled = torch.compile(skip_linear, backend="aot_eager", fullgraph=True)
    ours, eager = (evaluate(f, [*inputs], grad) for f in (compiled, skip_linear))
    assert [a.equal(b) for a, b in zip(ours, eager, strict=True)] == [True] * 5


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast: bool) -> None:
    """By autocast parameters stay in fp32 and get their gradients in it."""
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs, grad = draw_inputs(37, dtype=dtype), draw(37, 20, dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        out, *grads = evaluate(skip_linear, [*inputs], grad)
    assert out.dtype == torch.bfloat16
    assert {g.dtype for g in grads} == {dtype}
    assert_exact([out, *grads], [*inputs], grad, bound=2**-7)


def test_a_bias_may_be_wider() -> None:
    x, skip, weight, bias = draw_inputs(37, dtype=torch.bfloat16)
    inputs, grad = [x, skip, weight, bias.float()], draw(37, 20, dtype=torch.bfloat16)
    out, *grads = evaluate(skip_linear, [*inputs], grad)
    assert [out.dtype, *(g.dtype for g in grads)] == [torch.bfloat16] * 4 + [torch.float32]
    assert_exact([out, *grads], [*inputs], grad, bound=2**-7)
    torch.testing.assert_close(grads[3], grad.float().sum(0), rtol=1e-5, atol=1e-5)  # never rounded to bf16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": (36, 24)}, r"x \(37, 24\), skip \(36, 24\): must agree in all but the last dim"),
        ({"weight": (20, 47)}, r"weight \(20, 47\): must be \(E, 48\)"),
        ({"bias": (48,)}, r"bias \(48,\): must be \(20,\), one for each output of weight"),
    ],
)
def test_mistakes_are_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    inputs = dict(zip(NAMES, draw_inputs(37), strict=True))
    with pytest.raises(ValueError, match=message):
        skip_linear(**inputs | {name: draw(*shape) for name, shape in changes.items()})


@pytest.mark.parametrize("name", ["skip", "weight", "bias"])
def test_mixed_dtypes_are_named(name: str) -> None:
    inputs = dict(zip(NAMES, draw_inputs(37), strict=True))
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.bfloat16, x torch\.float32: must be"):
        skip_linear(**inputs | {name: inputs[name].bfloat16()})


@pytest.mark.gpu
def test_real_sizes_in_bf16() -> None:
    inputs = draw_inputs(4100, width=1152, skip=1152, out=1152, dtype=torch.bfloat16)
    grad = draw(4100, 1152, dtype=torch.bfloat16)
    exact = evaluate(concatenated, [x.double() for x in inputs], grad.double())
    theirs, ours = (evaluate(f, [*inputs], grad) for f in (concatenated, skip_linear))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (other - truth).norm()
    for _ in range(5):
        again = evaluate(skip_linear, [*inputs], grad)
        assert [a.equal(b) for a, b in zip(again, ours, strict=True)] == [True] * 5
