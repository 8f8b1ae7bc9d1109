"""Norm and rotation of a packed qkv in Triton's interpreter, against the fp64 reference; the operator.

bf16 is left out: the interpreter multiplies its bit patterns.
"""

import functools
import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import qk_norm_rope as module
from dtrain.kernels import qk_norm_rope_kernels, reference
from dtrain.kernels.qk_norm_rope import qk_norm_rope
from dtrain.kernels.serving import _serve
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

OPS = torch.ops.dtrain
# Error over norm: one rounding.
BOUND = {torch.float16: 4e-4, torch.float32: 1e-6}
PARTS = list(itertools.product([True, False], repeat=3))  # norm of q, norm of k, rotation

triton = functools.partial(qk_norm_rope, backend="triton")
plain = functools.partial(qk_norm_rope, backend="reference")


def draw_how(
    tokens: int, head_dim: int, dtype: torch.dtype, parts: tuple[bool, bool, bool] = (True, True, True)
) -> dict[str, Any]:
    angles = 7 * draw(tokens, head_dim // 2, seed=3)
    how = {
        "q_weight": 1 + 0.3 * draw(head_dim, seed=1, dtype=dtype) if parts[0] else None,
        "k_weight": 1 + 0.3 * draw(head_dim, seed=2, dtype=dtype) if parts[1] else None,
        "cos": angles.cos() if parts[2] else None,
        "sin": angles.sin() if parts[2] else None,
    }
    return {name: x for name, x in how.items() if x is not None}


def draw_grads(qkv: Tensor) -> list[Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    return [draw(batch, heads, tokens, width, seed=s, dtype=qkv.dtype) for s in (7, 8, 9)]


def evaluate(function: Any, qkv: Tensor, how: dict[str, Any], grads: list[Tensor]) -> dict[str, Tensor]:
    """q, k, v and the gradients by qkv and by the weights that there are."""
    leaves = {name: how[name].detach().requires_grad_() for name in ("q_weight", "k_weight") if name in how}
    qkv = qkv.detach().requires_grad_()
    outputs = function(qkv, **how | leaves)
    found = torch.autograd.grad(outputs, [qkv, *leaves.values()], grads)
    names = ("q", "k", "v", "grad_qkv", *(f"grad_{name}" for name in leaves))
    return dict(zip(names, (*outputs, *found), strict=True))


def assert_exact(qkv: Tensor, how: dict[str, Any], grads: list[Tensor]) -> None:
    """Outputs and gradients agree with fp64 as far as the dtype reaches, and in dtype."""
    ours = evaluate(triton, qkv, how, grads)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in how.items()}
    exact = evaluate(plain, qkv.double(), wide, [g.double() for g in grads])
    assert ours.keys() == exact.keys()
    for name, mine in ours.items():
        error = (mine.double() - exact[name]).norm() / exact[name].norm()
        assert error < BOUND[qkv.dtype], f"{name}: {error:.1e}"
        assert mine.dtype == how.get(name.removeprefix("grad_"), qkv).dtype


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name: x.equal(theirs[name]) for name, x in ours.items()} == dict.fromkeys(theirs, True)


@needs_triton
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("parts", PARTS[:-1])
def test_each_part_alone_and_together(parts: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    qkv = draw(2, 37, 3, 3, 64, dtype=dtype)
    assert_exact(qkv, draw_how(37, 64, dtype, parts), draw_grads(qkv))


@needs_triton
@pytest.mark.parametrize("tokens", [1, 63, 129, 500])
def test_lengths(tokens: int) -> None:
    qkv = draw(1, tokens, 3, 1, 128, dtype=torch.float16)
    assert_exact(qkv, draw_how(tokens, 128, torch.float16), draw_grads(qkv))


@needs_triton
@pytest.mark.parametrize("head_dim", [2, 20, *range(32, 129, 8), 256])
def test_head_dims(head_dim: int) -> None:
    qkv = draw(2, 19, 3, 2, head_dim, dtype=torch.float16)
    assert_exact(qkv, draw_how(19, head_dim, torch.float16), draw_grads(qkv))


@needs_triton
@pytest.mark.parametrize("heads", [1, 8, 11])
def test_more_heads_than_a_program_takes(heads: int) -> None:
    assert qk_norm_rope_kernels._LAUNCH["sm_80"].heads == 8
    qkv = draw(2, 19, 3, heads, 40, dtype=torch.float16)
    assert_exact(qkv, draw_how(19, 40, torch.float16), draw_grads(qkv))


@needs_triton
def test_one_rounding_where_the_reference_has_several() -> None:
    qkv = draw(1, 64, 3, 2, 64, dtype=torch.float16)
    how = draw_how(64, 64, torch.float32)  # weights as they are under autocast
    exact = plain(qkv.double(), **{name: x.double() for name, x in how.items()})
    ours, theirs = triton(qkv, **how), plain(qkv, **how)
    for mine, other, truth in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        assert mine.equal(truth.half()) or (mine - truth).norm() < 0.8 * (other - truth).norm()


@needs_triton
@pytest.mark.parametrize("view", ["heads first", "rows of 73", "every other token", "one row", "columns"])
def test_any_strides(view: str) -> None:
    qkv = draw(2, 1 if view == "one row" else 35, 3, 2, 72, dtype=torch.float16)
    strided = {
        "heads first": lambda x: x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
        "rows of 73": lambda x: torch.cat([x, x[..., :1]], dim=-1)[..., :72],
        "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "one row": lambda x: x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:])),
        "columns": lambda x: x.mT.contiguous().mT,
    }[view](qkv)
    assert strided.stride() != qkv.stride()
    assert strided.equal(qkv)
    how, grads = draw_how(qkv.shape[1], 72, torch.float16), draw_grads(qkv)
    assert_same(evaluate(triton, strided, how, grads), evaluate(triton, qkv, how, grads))


@needs_triton
@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (1, 2, 1, 72), (1, 1, 35, 1)])
def test_expanded_gradients(dims: tuple[int, ...]) -> None:
    qkv, how = draw(1, 35, 3, 2, 72, dtype=torch.float16), draw_how(35, 72, torch.float16)
    grads = [draw(*dims, seed=s, dtype=torch.float16).expand(1, 2, 35, 72) for s in range(3)]
    packed = [g.contiguous() for g in grads]
    assert_same(evaluate(triton, qkv, how, grads), evaluate(triton, qkv, how, packed))


@needs_triton
@pytest.mark.parametrize(("tokens", "head_dim"), [(129, 64), (37, 72), (1, 120)])
@pytest.mark.parametrize("values", [True, False])
def test_every_element_is_written_and_none_beyond(tokens: int, head_dim: int, values: bool) -> None:
    slots, beyond = 3 if values else 2, 512 * head_dim
    qkv = draw(2, tokens, 3, 2, head_dim, dtype=torch.float16)
    given = draw_how(tokens, head_dim, torch.float16)
    how = module.NormRope(**given, eps=1e-6)

    def poisoned(*shape: int) -> tuple[Tensor, Tensor]:
        buffer = torch.full((math.prod(shape) + beyond,), math.nan, dtype=qkv.dtype, device=DEVICE)
        return buffer, buffer[:-beyond].view(shape)

    buffers, outputs = zip(*(poisoned(2, tokens, 2, head_dim) for _ in range(slots)), strict=True)
    qk_norm_rope_kernels.forward(qkv, how, outputs)
    for buffer, out, expected in zip(buffers, outputs, triton(qkv, **given), strict=False):
        assert out.transpose(1, 2).equal(expected)
        assert buffer[-beyond:].isnan().all()

    buffer, grad_qkv = poisoned(*qkv.shape)
    grads = [g.transpose(1, 2) for g in draw_grads(qkv)]
    weights = qk_norm_rope_kernels.backward(grads[:slots], qkv, how, grad_qkv)
    assert buffer[-beyond:].isnan().all()
    assert grad_qkv[:, :, 2].isnan().all() != values
    expected = evaluate(triton, qkv, given, draw_grads(qkv))
    assert grad_qkv[:, :, :slots].equal(expected["grad_qkv"][:, :, :slots])
    assert [w.equal(expected[f"grad_{n}"]) for n, w in zip(given, weights, strict=False)] == [True, True]


@needs_triton
def test_gradients_may_lie_where_they_end_up() -> None:
    qkv, given = draw(2, 37, 3, 2, 72, dtype=torch.float16), draw_how(37, 72, torch.float16)
    expected = evaluate(triton, qkv, given, draw_grads(qkv))["grad_qkv"]
    packed = torch.stack([g.transpose(1, 2) for g in draw_grads(qkv)], dim=2)
    qk_norm_rope_kernels.backward(packed.unbind(2), qkv, module.NormRope(**given, eps=1e-6), packed)
    assert packed.equal(expected)


@needs_triton
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(eps: float) -> None:
    qkv = 0.3 * draw(1, 35, 3, 2, 64)
    assert_exact(qkv, draw_how(35, 64, torch.float32) | {"eps": eps}, draw_grads(qkv))


@needs_triton
def test_offsets_beyond_31_bits() -> None:
    tokens, stride = 129, 2**24 + 8
    memory = torch.empty(tokens * stride, dtype=torch.float16, device=DEVICE)  # pages never touched are free
    far = memory.as_strided((1, tokens, 3, 1, 32), (0, stride, 32, 0, 1))
    assert (tokens - 1) * stride >= 2**31
    near, how = draw(*far.shape, dtype=torch.float16), draw_how(tokens, 32, torch.float16)
    far.copy_(near)
    assert_same(evaluate(triton, far, how, draw_grads(near)), evaluate(triton, near, how, draw_grads(near)))


@needs_triton
def test_angles_and_weights_stay_as_they_are() -> None:
    qkv, how = draw(1, 35, 3, 2, 64, dtype=torch.float16), draw_how(35, 64, torch.float16)
    before = {name: x.clone() for name, x in how.items()}
    evaluate(triton, qkv, how, draw_grads(qkv))
    assert_same(how, before)


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("parts", [(True, True, True), (False, True, False)])
def test_operators_keep_their_promises(
    parts: tuple[bool, bool, bool], interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not interpreted:
        monkeypatch.setattr(qk_norm_rope_kernels, "can_launch", lambda device: False)
    given = draw_how(5, 32, torch.float32, parts)
    how = [given.get(name) for name in ("q_weight", "k_weight", "cos", "sin")]
    leaves = [x if x is None else x.requires_grad_(i < 2) for i, x in enumerate(how)]
    qkv = draw(2, 5, 3, 2, 32)
    torch.library.opcheck(OPS.qk_norm_rope, (qkv.requires_grad_(), *leaves, 1e-6))
    with torch.no_grad():
        grads = draw_grads(qkv)
        saved = qkv if any(parts[:2]) else None
        torch.library.opcheck(OPS.qk_norm_rope_backward, (*grads, saved, *how, 1e-6))


@pytest.mark.parametrize("parts", PARTS[:-1])
def test_without_triton_the_operator_is_the_reference(
    parts: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients, from their equations, are those that PyTorch derives."""
    monkeypatch.setattr(qk_norm_rope_kernels, "can_launch", lambda device: False)

    def operator(qkv: Tensor, q_weight=None, k_weight=None, cos=None, sin=None) -> Any:
        return OPS.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, 1e-6)

    qkv = draw(2, 5, 3, 2, 32, dtype=torch.float64).cpu()
    how = {name: x.cpu() for name, x in draw_how(5, 32, torch.float64, parts).items()}
    grads = [g.cpu() for g in draw_grads(qkv)]
    torch.testing.assert_close(evaluate(operator, qkv, how, grads), evaluate(plain, qkv, how, grads))


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()
    function = functools.partial(qk_norm_rope, backend=backend)
    qkv, how = draw(1, 17, 3, 2, 40), draw_how(17, 40, torch.float32)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    grads = draw_grads(qkv)
    torch.testing.assert_close(evaluate(compiled, qkv, how, grads), evaluate(function, qkv, how, grads))


def test_without_norms_the_backward_keeps_no_qkv() -> None:
    kept: list[Tensor] = []
    qkv = draw(1, 17, 3, 2, 40).requires_grad_()
    cos = draw_how(17, 40, torch.float32)["cos"]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        OPS.qk_norm_rope(qkv, None, None, cos, cos, 1e-6)
    assert {x.shape for x in kept} == {cos.shape}


def test_auto_on_the_cpu_is_the_reference_and_copies_nothing_that_it_need_not() -> None:
    qkv = draw(1, 5, 3, 2, 40).cpu()
    how = {name: x.cpu() for name, x in draw_how(5, 40, torch.float32).items()}
    assert all(a.equal(b) for a, b in zip(qk_norm_rope(qkv, **how), plain(qkv, **how), strict=True))

    def views(outputs: tuple[Tensor, ...]) -> list[bool]:
        return [x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in outputs]

    assert views(qk_norm_rope(qkv)) == [True] * 3
    assert views(qk_norm_rope(qkv, **how)) == [False, False, True]


def test_a_gpu_that_is_not_served_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve.cache_clear()
    monkeypatch.setattr(qk_norm_rope_kernels, "can_launch", lambda device: True)
    with caplog.at_level(logging.WARNING):
        served = [module._fused("auto", torch.device("cuda"), torch.float32, d) for d in (64, 33, 33)]
    assert served == [True, False, False]
    assert [r.getMessage() for r in caplog.records] == [
        "norm and rotation of queries and keys take several passes: head dim 33 is not even, or above 256"
    ]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_weights_may_be_wider_than_qkv(autocast: torch.dtype) -> None:
    """As under autocast, where parameters stay in fp32."""
    qkv, how = draw(1, 5, 3, 2, 40, dtype=autocast).cpu(), draw_how(5, 40, torch.float32)
    how = {name: x.cpu() for name, x in how.items()}
    with torch.autocast("cpu", autocast):
        found = evaluate(qk_norm_rope, qkv, how, [g.cpu() for g in draw_grads(qkv)])
    assert [x.dtype for x in found.values()] == [autocast] * 4 + [torch.float32] * 2


def test_bytes_are_those_of_the_tensors() -> None:
    """Counted with what the operators are given and give, of which the weights are next to nothing."""
    qkv, how = draw(2, 50, 3, 4, 40), draw_how(50, 40, torch.float32)
    tables = how["cos"].nbytes + how["sin"].nbytes
    outputs = plain(qkv, **how)
    moved = qkv.nbytes + sum(x.nbytes for x in outputs) + tables
    assert module.forward_bytes(2, 50, 4, 40, itemsize=4) == moved
    values = outputs[2].nbytes
    assert module.forward_bytes(2, 50, 4, 40, itemsize=4, values=False) == moved - 2 * values
    back = moved + qkv.nbytes - values  # the gradients as well as queries and keys
    assert module.backward_bytes(2, 50, 4, 40, itemsize=4) == back
    assert module.backward_bytes(2, 50, 4, 40, itemsize=4, values=False) == back - 2 * values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": (1, 5, 2, 2, 8)}, r"must be \(B, N, 3, H, D\)"),
        ({"qkv": (1, 0, 3, 2, 8)}, "at least 1"),
        ({"q_weight": (4,)}, r"q_weight \(4,\): must be \(8,\)"),
        ({"k_weight": (8, 1)}, r"k_weight \(8, 1\)"),
        ({"cos": (5, 4)}, "both, or neither"),
        ({"cos": (5, 4), "sin": (5, 8)}, r"sin \(5, 8\): must be \(N, D/2\)"),
        ({"cos": (4, 4), "sin": (4, 4)}, r"cos \(4, 4\)"),
        ({"qkv": (1, 5, 3, 2, 9), "cos": (5, 4), "sin": (5, 4)}, "an even D"),
    ],
)
def test_mistakes_are_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = {name: draw(*shape) for name, shape in ({"qkv": (1, 5, 3, 2, 8)} | changes).items()}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**tensors)


def test_angles_are_fp32_and_constants() -> None:
    qkv, cos = draw(1, 5, 3, 2, 8), draw(5, 4)
    with pytest.raises(ValueError, match=r"cos has dtype torch.bfloat16: must be float32"):
        qk_norm_rope(qkv, cos=cos.bfloat16(), sin=cos.bfloat16())
    with pytest.raises(ValueError, match=r"sin requires a gradient.*sin.detach"):
        qk_norm_rope(qkv, cos=cos, sin=cos.clone().requires_grad_())


def test_a_backend_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend = 'cudnn'"):
        qk_norm_rope(draw(1, 5, 3, 2, 8), q_weight=draw(8), backend="cudnn")
    monkeypatch.setattr(qk_norm_rope_kernels, "can_launch", lambda device: False)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*TRITON_INTERPRET"):
        triton(draw(1, 5, 3, 2, 8), q_weight=draw(8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_references_backward_is_autograds_and_keeps_dtypes(dtype: torch.dtype) -> None:
    x, weight = draw(2, 3, 5, 8, dtype=dtype).requires_grad_(), draw(8, seed=1, dtype=dtype).requires_grad_()
    cos, sin = (f(draw(5, 4, seed=2)) for f in (torch.cos, torch.sin))
    out = reference.apply_rope(reference.rms_norm(x, weight, 0.1), cos, sin)
    grad = draw(*out.shape, seed=3, dtype=dtype)
    ours = reference.norm_rope_backward(grad, x, weight, cos, sin, 0.1)
    assert [g.dtype for g in ours] == [dtype] * 2
    if dtype == torch.float64:
        torch.testing.assert_close(ours, torch.autograd.grad(out, (x, weight), grad))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_real_sizes_in_bf16(head_dim: int) -> None:
    """No more error than PyTorch's several passes make, and the same bits in every run."""
    qkv, how = draw(2, 4100, 3, 12, head_dim, dtype=torch.bfloat16), draw_how(4100, head_dim, torch.bfloat16)
    grads = draw_grads(qkv)
    wide = {name: x.double() for name, x in how.items()}
    exact = evaluate(plain, qkv.double(), wide, [g.double() for g in grads])
    theirs, ours = evaluate(plain, qkv, how, grads), evaluate(triton, qkv, how, grads)
    for name, truth in exact.items():
        assert (ours[name] - truth).norm() <= 1.1 * (theirs[name] - truth).norm(), name
    for _ in range(5):
        assert_same(evaluate(triton, qkv, how, grads), ours)
