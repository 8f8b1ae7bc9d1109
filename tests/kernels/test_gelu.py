"""GELU with the linear layer behind it, on PyTorch's passes and, in Triton's interpreter, on the kernels.

bf16 is left out of the interpreter, which multiplies its bit patterns.
"""

import functools
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtrain.kernels import gelu_kernels
from dtrain.kernels import gelu_linear as module
from dtrain.kernels.gelu_linear import gelu_linear
from dtrain.kernels.serving import _serve
from tests.kernels.attention_checks import DEVICE, draw, needs_triton
from tests.kernels.products import declared_flops, performed_flops

OPS = torch.ops.dtrain
APPROXIMATE = ["none", "tanh"]
# Error over norm. The activation and dact are rounded once, the products add their own.
BOUND = {torch.float16: 6e-4, torch.float32: 1e-6, torch.float64: 1e-14}

triton = functools.partial(gelu_linear, backend="triton")
plain = functools.partial(gelu_linear, backend="reference")
BACKENDS = [pytest.param("triton", marks=needs_triton), "auto"]


def draw_inputs(
    rows: int,
    hidden: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    biases: torch.dtype | None = None,
    parts: tuple[bool, bool] = (True, True),
) -> dict[str, Tensor | None]:
    """pre, bias, weight, out_bias; biases in their own dtype, or left out by `parts`."""
    return {
        "pre": draw(rows, hidden, dtype=dtype, scale=2.0),
        "bias": draw(hidden, seed=1, dtype=biases or dtype) if parts[0] else None,
        "weight": draw(width, hidden, seed=2, dtype=dtype, scale=hidden**-0.5),
        "out_bias": draw(width, seed=3, dtype=biases or dtype) if parts[1] else None,
    }


def evaluate(function: Any, inputs: dict[str, Any], grad: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output, and the gradient by every tensor that there is."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    out = function(**inputs | leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def widen(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else x.double() for name, x in inputs.items()}


def assert_exact(ours: dict[str, Tensor], exact: dict[str, Tensor], inputs: dict[str, Any]) -> None:
    """As near to fp64 as the dtype of the activations allows, each in its own dtype."""
    dtype = next(iter(inputs.values())).dtype
    assert ours.keys() == exact.keys()
    for name, mine in ours.items():
        error = (mine.double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)
        assert error < BOUND[dtype], f"{name}: {error:.1e}"
        given = inputs.get(name.removeprefix("grad_"))
        assert mine.dtype == (dtype if given is None else given.dtype), name


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name: x.equal(theirs[name]) for name, x in ours.items()} == dict.fromkeys(theirs, True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_each_part_alone_and_together(parts: tuple[bool, bool], dtype: torch.dtype, approximate: str) -> None:
    inputs, grad = draw_inputs(37, 300, 20, dtype, parts=parts), draw(37, 20, seed=7, dtype=dtype)
    exact = evaluate(plain, widen(inputs), grad.double(), approximate=approximate)
    assert_exact(evaluate(triton, inputs, grad, approximate=approximate), exact, inputs)


@needs_triton
@pytest.mark.parametrize("rows", [1, 63, 127, 129, 500])
@pytest.mark.parametrize("hidden", [1, 33, 256, 272])
def test_sizes(rows: int, hidden: int) -> None:
    inputs, grad = draw_inputs(rows, hidden, 8), draw(rows, 8, seed=7)
    assert_exact(evaluate(triton, inputs, grad), evaluate(plain, widen(inputs), grad.double()), inputs)


@needs_triton
def test_wider_biases_are_added_in_their_own_precision() -> None:
    inputs, grad = draw_inputs(129, 300, 20, torch.float16, torch.float32), draw(129, 20, dtype=torch.float16)
    assert_exact(evaluate(triton, inputs, grad), evaluate(plain, widen(inputs), grad.double()), inputs)


@needs_triton
def test_sums_are_all_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to is NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ones(1).new_empty(3).isnan().all()
        inputs, grad = draw_inputs(129, 272, 8), draw(129, 8, seed=7)
        found = evaluate(triton, inputs, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, evaluate(triton, inputs, grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["transposed", "columns", "every other row"])
def test_any_strides(view: str, backend: str) -> None:
    inputs, grad = draw_inputs(38, 40, 12), draw(38, 12, seed=7)
    pre = inputs["pre"]
    strided = {
        "transposed": pre.t().contiguous().t(),
        "columns": torch.cat([pre, pre], dim=1)[:, :40],
        "every other row": pre.repeat_interleave(2, dim=0)[::2],
    }[view]
    assert strided.stride() != pre.stride()
    ours = evaluate(gelu_linear, inputs | {"pre": strided}, grad, backend=backend)
    assert_exact(ours, evaluate(plain, widen(inputs), grad.double()), inputs)
    assert ours["grad_pre"].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(1, 1), (1, 12), (38, 1)])
def test_expanded_gradients(dims: tuple[int, int], backend: str) -> None:
    inputs, grad = draw_inputs(38, 40, 12), draw(*dims, seed=7).expand(38, 12)
    packed = evaluate(gelu_linear, inputs, grad.contiguous(), backend=backend)
    assert_same(evaluate(gelu_linear, inputs, grad, backend=backend), packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(40,), (0, 40), (2, 0, 40), (2, 3, 2, 40)])
def test_any_dims_and_no_rows(dims: tuple[int, ...], backend: str) -> None:
    inputs = draw_inputs(1, 40, 12) | {"pre": draw(*dims)}
    grad = draw(*dims[:-1], 12, seed=7)
    ours = evaluate(gelu_linear, inputs, grad, backend=backend)
    assert_exact(ours, evaluate(plain, widen(inputs), grad.double()), inputs)
    assert ours["out"].shape == grad.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["pre", "bias", "weight", "out_bias"])
def test_only_what_is_asked_for(wanted: str, backend: str) -> None:
    inputs, grad = draw_inputs(38, 40, 12), draw(38, 12, seed=7)
    every = evaluate(gelu_linear, inputs, grad, backend=backend)
    leaf = inputs[wanted].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = gelu_linear(**inputs, backend=backend)
        (alone,) = torch.autograd.grad(out, leaf, grad)
    assert alone.equal(every[f"grad_{wanted}"])
    products = {"pre": 2, "bias": 2, "weight": 2, "out_bias": 1}[wanted]
    assert counter.get_total_flops() == products * 2 * 38 * 40 * 12


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_declared_flops_are_those_of_the_products(needs: tuple[bool, ...], fused: bool) -> None:
    how = (*draw_inputs(38, 40, 12).values(), "none", fused)
    assert declared_flops(module.gelu_linear_op, *how) == performed_flops(module.gelu_linear_op, *how)
    call = (module._backward, draw(38, 12, seed=7), *how, needs)
    assert declared_flops(*call) == performed_flops(*call)


def test_pytorchs_passes_are_pytorchs_bits() -> None:
    """On a CPU, where no bias has to be added first."""
    inputs, grad = draw_inputs(37, 40, 12, parts=(False, True)), draw(37, 12, seed=7)
    inputs, grad = {name: None if x is None else x.cpu() for name, x in inputs.items()}, grad.cpu()
    for approximate in APPROXIMATE:
        ours = evaluate(gelu_linear, inputs, grad, approximate=approximate)
        assert_same(ours, evaluate(plain, inputs, grad, approximate=approximate))


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("parts", [(True, True), (False, False)])
def test_gradients_are_the_functions_own(parts: tuple[bool, bool], approximate: str) -> None:
    inputs = draw_inputs(3, 4, 2, torch.float64, parts=parts)
    leaves = [None if x is None else x.cpu().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(functools.partial(gelu_linear, approximate=approximate), leaves)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("parts", [(True, True), (False, False)])
def test_operators_keep_their_promises(parts: tuple[bool, bool], fused: bool) -> None:
    inputs = draw_inputs(10, 40, 12, parts=parts)
    inputs["pre"] = inputs["pre"].view(2, 5, 40)
    leaves = [x if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(OPS.gelu_linear, (*leaves, "none", fused))
    with torch.no_grad():
        needs = [True, parts[0], False, parts[1]]
        torch.library.opcheck(OPS.gelu_linear_backward, (draw(2, 5, 12), *leaves, "tanh", fused, needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_as_one_graph(backend: str) -> None:
    inputs, grad = draw_inputs(37, 40, 12), draw(37, 12, seed=7)
    compiled = torch.compile(gelu_linear, backend="aot_eager", fullgraph=True)
    ours = evaluate(compiled, inputs, grad, backend=backend)
    assert_same(ours, evaluate(gelu_linear, inputs, grad, backend=backend))


def test_without_a_dispatcher_the_results_are_the_same() -> None:
    inputs, grad = draw_inputs(37, 40, 12), draw(37, 12, seed=7)
    with FlopCounterMode(display=False) as counter:
        watched = evaluate(gelu_linear, inputs, grad)
    assert counter.get_total_flops() == 3 * 2 * 37 * 40 * 12
    assert_same(watched, evaluate(gelu_linear, inputs, grad))


def test_it_keeps_its_inputs_and_nothing_else() -> None:
    inputs = draw_inputs(37, 40, 12)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gelu_linear(**{name: x.requires_grad_() for name, x in inputs.items()})
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs.values()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend: str) -> None:
    """Parameters stay in fp32 and get gradients in it; nothing but they and pre is kept."""
    inputs, grad = draw_inputs(37, 64, 12), draw(37, 12, seed=7, dtype=torch.bfloat16)
    exact = evaluate(plain, widen(inputs), grad.double())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = evaluate(gelu_linear, inputs, grad, backend=backend)
    assert ours["out"].dtype == torch.bfloat16
    for name, x in ours.items():
        assert x.dtype == (torch.bfloat16 if name == "out" else torch.float32)
        assert (x.double() - exact[name]).norm() < 2**-7 * exact[name].norm(), name


def test_bytes_are_those_of_the_tensors() -> None:
    rows, hidden = 129, 272
    pre, bias = torch.empty(rows, hidden, dtype=torch.bfloat16), torch.empty(hidden)
    assert module.forward_bytes(rows, hidden, bias_itemsize=4) == 2 * pre.nbytes + bias.nbytes
    sums = torch.empty(gelu_kernels.partial_sums(rows, "sm_90"), hidden)
    assert sums.shape[0] == 3
    moved = 4 * pre.nbytes + bias.nbytes + 2 * sums.nbytes
    assert module.backward_bytes(rows, hidden, bias_itemsize=4, sums=3) == moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": (12, 41)}, r"weight \(12, 41\): must be \(E, 40\)"),
        ({"weight": (40,)}, r"weight \(40,\): must be \(E, 40\)"),
        ({"bias": (41,)}, r"bias \(41,\): must be \(40,\), the width of pre"),
        ({"out_bias": (40,)}, r"out_bias \(40,\): must be \(12,\)"),
    ],
)
def test_mistakes_are_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    inputs = draw_inputs(3, 40, 12) | {name: draw(*shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        gelu_linear(**inputs)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("weight", torch.bfloat16, "weight has dtype torch.bfloat16, pre torch.float32: .*torch.autocast"),
        ("bias", torch.bfloat16, "bias has dtype torch.bfloat16, pre torch.float32: must be that or wider"),
        ("out_bias", torch.float16, "out_bias has dtype torch.float16, pre torch.float32"),
    ],
)
def test_mixed_dtypes_are_named(name: str, dtype: torch.dtype, message: str) -> None:
    inputs = draw_inputs(3, 40, 12)
    with pytest.raises(ValueError, match=message):
        gelu_linear(**inputs | {name: inputs[name].to(dtype)})


def test_options_that_cannot_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw_inputs(3, 40, 12)
    with pytest.raises(ValueError, match="backend = 'cudnn': must be one of 'auto', 'triton', 'reference'"):
        gelu_linear(**inputs, backend="cudnn")
    with pytest.raises(ValueError, match="approximate = 'erf': must be one of 'none', 'tanh'"):
        gelu_linear(**inputs, approximate="erf")
    monkeypatch.setattr(gelu_kernels, "can_launch", lambda device: False)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*TRITON_INTERPRET"):
        triton(**inputs)


@needs_triton
def test_fp64_is_refused_by_the_kernels() -> None:
    with pytest.raises(ValueError, match=r"backend = 'triton': torch.float64 is none of float16"):
        triton(**draw_inputs(3, 40, 12, torch.float64))


def test_what_is_not_served_on_a_gpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _serve.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert module.serving("auto", "none", torch.device("cuda"), torch.float64) == "passes"
    (record,) = caplog.records
    assert record.getMessage().startswith("GELU and its gradient take several passes: ")


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [3072, 4608])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_real_sizes_in_bf16(hidden: int, approximate: str) -> None:
    """No more error than PyTorch's operators make, and the same bits in every run."""
    inputs = draw_inputs(4100, hidden, 1152, torch.bfloat16)
    grad = draw(4100, 1152, seed=7, dtype=torch.bfloat16)
    exact = evaluate(plain, widen(inputs), grad.double(), approximate=approximate)
    theirs, ours = (evaluate(f, inputs, grad, approximate=approximate) for f in (plain, triton))
    for name, truth in exact.items():
        assert (ours[name] - truth).norm() <= 1.1 * (theirs[name] - truth).norm(), name
    for _ in range(5):
        assert_same(evaluate(triton, inputs, grad, approximate=approximate), ours)
