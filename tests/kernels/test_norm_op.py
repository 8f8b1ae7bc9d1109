"""The fused norm as operators of PyTorch: promises, the path on a CPU, compilation, autocast, mistakes."""

import functools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels import norm as module
from dtrain.kernels import norm_launch
from dtrain.kernels.norm import add_norm, gated_add, norm
from dtrain.kernels.serving import _serve
from tests.kernels.attention_checks import draw, needs_triton
from tests.kernels.norm_checks import EVERYTHING, assert_same, draw_given, draw_grads, evaluate, in_double

OPS = torch.ops.dtrain
NAMES = ("x", "branch", "gate", "weight", "bias", "scale", "shift")
_SOME = [EVERYTHING, ("branch", "weight"), ("scale",), ()]


def flat(
    given: dict[str, Tensor], kind: str = "layer", dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments of the operator."""
    return (*(given.get(name) for name in NAMES), kind, 1e-5, dtype)


def by_operator(given: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    s, y, _, _ = OPS.norm(*flat(leaves, dtype=grads["y"].dtype))
    outputs = {"s": s, "y": y} if "branch" in given else {"y": y}
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [grads[n] for n in outputs])
    return outputs | {f"grad_{n}": g for n, g in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("names", _SOME)
def test_operators_keep_their_promises(
    names: tuple[str, ...], interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not interpreted:
        monkeypatch.setattr(norm_launch, "can_launch", lambda device: False)
    given = draw_given((2, 5, 40), names)
    torch.library.opcheck(OPS.norm, flat({n: x.detach().requires_grad_() for n, x in given.items()}))
    with torch.no_grad():
        grads = draw_grads(given)
        s, _, mean, r = OPS.norm(*flat(given))
        saved = (
            s if "branch" in given else given["x"],
            mean,
            r,
            given.get("branch") if "gate" in names else None,
        )
        dtypes = (torch.float32, torch.float32 if "gate" in names else None)
        how = (*flat(given)[2:-1], *dtypes)
        torch.library.opcheck(OPS.norm_backward, (grads["y"], grads.get("s"), *saved, *how))
        if "gate" in names:
            torch.library.opcheck(OPS.gated_add, (given["x"], given["branch"], given["gate"]))
            torch.library.opcheck(OPS.gated_add_backward, (grads["s"], given["branch"], given["gate"]))


@pytest.mark.parametrize("names", _SOME)
def test_without_triton_the_operator_is_the_reference(names: tuple[str, ...]) -> None:
    """Its gradients, from their equations, are those that PyTorch derives."""
    given = in_double({n: x.cpu() for n, x in draw_given((2, 5, 40), names).items()})
    grads = {n: g.cpu() for n, g in draw_grads(given).items()}
    torch.testing.assert_close(by_operator(given, grads), evaluate(given, grads, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_on_a_cpu_plain_norms_are_pytorchs_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    x, branch = (draw(2, 37, 40, seed=s, dtype=dtype).cpu() for s in (0, 1))
    weight, bias = (draw(40, seed=s, dtype=dtype).cpu() for s in (2, 3))
    theirs = (
        functools.partial(F.rms_norm, weight=weight)
        if kind == "rms"
        else functools.partial(F.layer_norm, weight=weight, bias=bias)
    )
    how: dict[str, Any] = {"kind": kind, "bias": None if kind == "rms" else bias}
    assert norm(x, weight, **how).equal(theirs(x, (40,), eps=1e-5))
    s, y = add_norm(x, branch, weight, **how)
    assert s.equal(x + branch)
    assert y.equal(theirs(x + branch, (40,), eps=1e-5))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_definition_is_pytorchs_norm(kind: str) -> None:
    """The equations written out, against PyTorch's own calls in fp64."""
    given = in_double(draw_given((2, 19, 40), tuple(n for n in EVERYTHING if kind == "layer" or n != "bias")))
    s, y = add_norm(**given, kind=kind, backend="reference")
    gate, scale, shift = (given[n][:, None] for n in ("gate", "scale", "shift"))
    expected = given["x"] + gate * given["branch"]
    normed = (
        F.layer_norm(expected, (40,), given["weight"], given["bias"])
        if kind == "layer"
        else F.rms_norm(expected, (40,), given["weight"], 1e-5)
    )
    torch.testing.assert_close((s, y), (expected, normed * (1 + scale) + shift))
    torch.testing.assert_close(
        gated_add(given["x"], given["branch"], given["gate"], backend="reference"), expected
    )


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("names", _SOME)
def test_compiles_without_a_break(names: tuple[str, ...], backend: str) -> None:
    torch.compiler.reset()
    given = draw_given((2, 17, 40), names)
    function = functools.partial(add_norm if "branch" in given else norm, backend=backend)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def run(called: Any) -> list[Tensor]:
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        found = called(**leaves)
        outputs = list(found) if isinstance(found, tuple) else [found]
        return [
            *outputs,
            *torch.autograd.grad(outputs, list(leaves.values()), list(draw_grads(given).values())),
        ]

    torch.testing.assert_close(run(compiled), run(function))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_gated_add_compiles(backend: str) -> None:
    torch.compiler.reset()
    given = draw_given((2, 17, 40), ("branch", "gate"))
    compiled = torch.compile(gated_add, backend="aot_eager", fullgraph=True)

    def run(called: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given.values()]
        s = called(*leaves, backend=backend)
        return [s, *torch.autograd.grad(s, leaves, draw_grads(given)["s"])]

    torch.testing.assert_close(run(compiled), run(gated_add))


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_autocast_changes_nothing(backend: str) -> None:
    """The residual stream and parameters in fp32, branches in 16 bits; y as its caller asks."""
    given = draw_given((2, 5, 40), EVERYTHING, torch.float32, torch.float16)
    grads = draw_grads(given)
    plain = evaluate(given, grads, backend=backend)
    with torch.autocast(given["x"].device.type, torch.bfloat16):
        assert_same(evaluate(given, grads, backend=backend), plain)
        found = evaluate(given, grads | {"y": grads["y"].half()}, backend=backend, dtype=torch.float16)
    assert (found["s"].dtype, found["y"].dtype) == (torch.float32, torch.float16)
    assert plain["y"].dtype == torch.float32


@needs_triton
@pytest.mark.parametrize(
    ("names", "kept"),
    [(EVERYTHING, {"s", "branch"}), (("branch", "weight", "bias"), {"s"}), ((), {"x"})],
)
def test_what_the_backward_keeps(names: tuple[str, ...], kept: set[str]) -> None:
    leaves = {n: x.detach().requires_grad_() for n, x in draw_given((2, 5, 40), names).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        s, _, _, _ = OPS.norm(*flat(leaves))
    rows = {x.data_ptr() for x in saved if x.shape == leaves["x"].shape}
    assert rows == {(leaves | {"s": s})[name].data_ptr() for name in kept}
    assert len([x for x in saved if x.shape == (2, 5)]) == 2  # mean and r


@needs_triton
def test_nothing_is_written_to_what_is_given() -> None:
    given = draw_given((2, 19, 40))
    grads = draw_grads(given)
    before = {n: x.clone() for n, x in (given | grads).items()}
    evaluate(given, grads, backend="triton")
    assert_same(given | grads, before)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_triton)])
def test_no_rows_are_nothing(backend: str) -> None:
    given = draw_given((2, 0, 40))
    found = evaluate(given, draw_grads(given), backend=backend)
    assert found["s"].shape == found["y"].shape == (2, 0, 40)
    assert not found["grad_weight"].any()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("names", [(), ("weight",), EVERYTHING, ("branch", "gate"), ("branch",)])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_the_tensors(names: tuple[str, ...], branch_dtype: torch.dtype, kind: str) -> None:
    """Counted with what the operators are given and give; mean and r are read as often as written."""
    names = tuple(n for n in names if kind == "layer" or n != "bias")
    given = draw_given((3, 5, 40), names, torch.float32, branch_dtype)
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    s, y, mean, r = OPS.norm(*flat(leaves, kind, branch_dtype))
    sizes: dict[str, Any] = {
        "rows": 15, "width": 40, "itemsize": 4, "branch_itemsize": branch_dtype.itemsize,
        "add": "branch" in given, "kind": kind, "affine": len({"weight", "bias"} & set(names)),
        "gated": 3 * ("gate" in names), "modulated": 3 * ("scale" in names),
    }  # fmt: skip
    moved = sum(x.nbytes for x in (*given.values(), s, y, mean, r))
    assert module.forward_bytes(**sizes) == moved
    grads = [torch.ones_like(x) for x in (s, y) if x.numel()]
    found = torch.autograd.grad([x for x in (s, y) if x.numel()], list(leaves.values()), grads)
    written = {x.data_ptr(): x.nbytes for x in found}
    read = [*grads, s if "branch" in given else given["x"], mean, r]
    read += [given[n] for n in ("weight", "scale", "gate") if n in given]
    read += [given["bias"]] if "scale" in names and "bias" in names else []
    read += [given["branch"]] if "gate" in names else []
    assert module.backward_bytes(**sizes) == sum(written.values()) + sum(x.nbytes for x in read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ()}, r"x \(\): must be \(..., D\)"),
        ({"x": (2, 5, 0)}, "with D at least 1"),
        ({"branch": (2, 5, 9)}, r"branch \(2, 5, 9\): must have the shape of x, \(2, 5, 8\)"),
        ({"branch": (1, 5, 8)}, r"branch \(1, 5, 8\)"),
        ({"weight": (4,)}, r"weight \(4,\): must be \(8,\)"),
        ({"bias": (1, 8)}, r"bias \(1, 8\)"),
        ({"gate": (8,)}, r"gate \(8,\): must be \(B, D\) or \(B, 1, D\)"),
        ({"scale": (1, 8)}, r"scale \(1, 8\)"),
        ({"shift": (2, 5, 8)}, r"shift \(2, 5, 8\)"),
        ({"x": (8,), "branch": (8,)}, r"gate .* last dim of x \(8,\)"),
    ],
)
def test_mistakes_are_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 5, 8), "branch": (2, 5, 8), "gate": (2, 8)} | changes
    with pytest.raises(ValueError, match=message):
        add_norm(**{name: draw(*shape) for name, shape in shapes.items()})


def test_kinds_and_their_biases_are_checked() -> None:
    with pytest.raises(ValueError, match="kind = 'batch': must be 'layer' or 'rms'"):
        norm(draw(2, 8), kind="batch")
    with pytest.raises(ValueError, match="bias: kind = 'rms' has none"):
        norm(draw(2, 8), bias=draw(8), kind="rms")


def test_a_backend_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend = 'cudnn'"):
        norm(draw(2, 8), backend="cudnn")
    monkeypatch.setattr(norm_launch, "can_launch", lambda device: False)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*TRITON_INTERPRET"):
        norm(draw(2, 8), backend="triton")


def test_a_gpu_that_is_not_served_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve.cache_clear()
    monkeypatch.setattr(norm_launch, "can_launch", lambda device: True)
    cases = [
        ((torch.float32,), 1024),
        ((torch.float32,), 9000),
        ((torch.float32,), 9000),
        ((torch.float64,), 64),
    ]
    with caplog.at_level(logging.WARNING):
        served = [module._fused("auto", torch.device("cuda"), *case) for case in cases]
    assert served == [True, False, False, False]
    assert [r.getMessage() for r in caplog.records] == [
        "norms take several passes: width 9000 is above 8192",
        "norms take several passes: torch.float64 is none of float16, bfloat16 and float32",
    ]
