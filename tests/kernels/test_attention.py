"""The attention kernels in Triton's interpreter, against the fp64 reference; the operators and their choice.

bf16 is left out: the interpreter multiplies its bit patterns.
"""

import functools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dtrain.kernels import attention as module
from dtrain.kernels import attention_dense, reference
from dtrain.kernels.attention import attention, merge
from dtrain.kernels.launch import can_launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = torch.ops.dtrain
# Error over norm. fp16 rounds the probabilities to 2^-11, fp32 sums in another order.
BOUND = {torch.float16: 6e-4, torch.float32: 2e-6}

needs_triton = pytest.mark.skipif(
    not can_launch(DEVICE), reason="the kernels need a GPU, or TRITON_INTERPRET=1 in the environment"
)
triton = functools.partial(attention, backend="triton")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def draw_qkv(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32, heads: int = 2
) -> list[Tensor]:
    return [draw(1, heads, n, head_dim, seed=s, dtype=dtype) for s, n in enumerate((queries, keys, keys))]


def evaluate(function, qkv: list[Tensor], grads: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """What the function gives, out or out and lse, then dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def assert_exact(qkv: list[Tensor], grads: tuple[Tensor, Tensor], scale: float | None = None) -> None:
    """Output, log-sum-exp and gradients agree with fp64 as far as the dtype reaches, and in dtype."""
    ours = evaluate(triton, qkv, grads, return_lse=True, scale=scale)
    wide = [x.double() for x in qkv]
    exact = evaluate(reference.attention_with_lse, wide, tuple(g.double() for g in grads), scale=scale)
    for name, mine, truth in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error < BOUND[qkv[0].dtype], f"{name}: {error:.1e}"
        assert mine.dtype == (torch.float32 if name == "lse" else qkv[0].dtype)


def draw_grads(q: Tensor) -> tuple[Tensor, Tensor]:
    return draw(*q.shape, seed=7, dtype=q.dtype), draw(*q.shape[:3], seed=8)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert [a.equal(b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)


@needs_triton
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (63, 63), (127, 127), (129, 129), (1, 129), (130, 1), (64, 128)]
)
def test_lengths(queries: int, keys: int, dtype: torch.dtype) -> None:
    qkv = draw_qkv(queries, keys, 64, dtype)
    assert_exact(qkv, draw_grads(qkv[0]))


@needs_triton
@pytest.mark.parametrize("head_dim", attention_dense.HEAD_DIMS)
def test_head_dims(head_dim: int) -> None:
    qkv = draw_qkv(19, 37, head_dim, torch.float16)
    assert_exact(qkv, draw_grads(qkv[0]))


@needs_triton
@pytest.mark.parametrize("dtype", BOUND)
def test_scale(dtype: torch.dtype) -> None:
    qkv = draw_qkv(33, 70, 72, dtype)
    assert_exact(qkv, draw_grads(qkv[0]), scale=0.3)


@needs_triton
def test_packed_views_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = draw(2, 70, 3, 3, 40, dtype=torch.float16).requires_grad_()  # (B, N, 3, H, D)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    grad = draw(2, 3, 70, 40, seed=1, dtype=torch.float16)
    expected = triton(*plain)
    expected_grads = torch.autograd.grad(expected, plain, grad)

    monkeypatch.setattr(Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy"))
    out = triton(q, k, v)
    (grad_packed,) = torch.autograd.grad(out, packed, grad)
    assert out.equal(expected)
    assert all(a.equal(b) for a, b in zip(grad_packed.permute(2, 0, 3, 1, 4), expected_grads, strict=True))
    assert out.transpose(1, 2).is_contiguous()  # joining the heads copies nothing


@needs_triton
@pytest.mark.parametrize("view", ["rows of 73", "one row", "transposed", "each its own"])
def test_any_strides(view: str) -> None:
    qkv = draw_qkv(1 if view == "one row" else 35, 35, 72, torch.float16)
    if view == "rows of 73":
        strided = [torch.cat([x, x[..., :1]], dim=-1)[..., :72] for x in qkv]
    elif view == "one row":
        strided = [x.as_strided(x.shape, (1, *x.stride()[1:])) for x in qkv]
    elif view == "transposed":
        strided = [x.mT.contiguous().mT for x in qkv]
    else:
        q, k, v = qkv
        strided = [
            q.transpose(1, 2).contiguous().transpose(1, 2),
            k,
            v.repeat_interleave(2, dim=2)[:, :, ::2],
        ]
    assert [x.stride() for x in strided] != [x.stride() for x in qkv]
    assert_same(
        evaluate(triton, strided, draw_grads(qkv[0])[:1]), evaluate(triton, qkv, draw_grads(qkv[0])[:1])
    )


@needs_triton
def test_offsets_beyond_31_bits() -> None:
    tokens, stride = 129, 2**24 + 8
    packed = torch.empty(
        tokens * stride, dtype=torch.float16, device=DEVICE
    )  # pages never touched cost nothing
    far = [packed.as_strided((1, 1, tokens, 32), (0, 0, stride, 1), 32 * i) for i in range(3)]
    assert (tokens - 1) * stride >= 2**31
    near = draw_qkv(tokens, tokens, 32, torch.float16, heads=1)
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    grads = draw_grads(near[0])[:1]
    assert_same(evaluate(triton, far, grads), evaluate(triton, near, grads))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_real_sizes_in_bf16(head_dim: int) -> None:
    """No more than twice the error of PyTorch's own attention, and the same bits in every run."""
    qkv = draw_qkv(2500, 2300, head_dim, torch.bfloat16, heads=4)
    grads = draw_grads(qkv[0])[:1]
    plain = functools.partial(attention, backend="reference")
    exact = evaluate(plain, [x.double() for x in qkv], (grads[0].double(),))
    theirs = evaluate(functools.partial(attention, backend="sdpa"), qkv, grads)
    ours = evaluate(triton, qkv, grads)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (other - truth).norm()
    for _ in range(19):
        assert_same(evaluate(triton, qkv, grads), ours)


def test_rows_of_a_packed_qkv_start_at_16_bytes_for_all_the_compiler_knows() -> None:
    q = draw(1, 5, 3, 2, 72).permute(2, 0, 3, 1, 4)[0]
    assert attention_dense._strides([q]) == (8, [0, 9, 54])
    assert attention_dense._strides([q[..., :71], draw(1, 2, 5, 71)])[0] == 1


@needs_triton
@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (1, 2, 1, 72), (1, 1, 35, 1)])
def test_expanded_gradients(dims: tuple[int, ...]) -> None:
    qkv = draw_qkv(35, 35, 72, torch.float16)
    grad = draw(*dims, dtype=torch.float16).expand_as(qkv[0])
    grad_lse = draw(1, 2, 1).expand(1, 2, 35)
    ours = evaluate(triton, qkv, (grad, grad_lse), return_lse=True)
    assert_same(ours, evaluate(triton, qkv, (grad.contiguous(), grad_lse.contiguous()), return_lse=True))


@needs_triton
@pytest.mark.parametrize(("tokens", "head_dim"), [(129, 64), (70, 72), (1, 120)])
def test_every_element_is_written_and_none_beyond(
    tokens: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffers.append(torch.full((size + 512 * head_dim,), math.nan, dtype=dtype, device=DEVICE))
        return buffers[-1][:size].view(shape)

    def empty_like(x: Tensor) -> Tensor:
        return poisoned((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype).transpose(1, 2)

    monkeypatch.setattr(attention_dense, "empty_like", empty_like)
    monkeypatch.setattr(attention_dense, "empty_lse", lambda q: poisoned(q.shape[:3], torch.float32))
    qkv = draw_qkv(tokens, tokens, head_dim, torch.float16)
    assert_exact(qkv, draw_grads(qkv[0]))
    assert len(buffers) == 6  # out, lse, dq, dk, dv, delta
    for buffer in buffers:
        assert buffer[: -512 * head_dim].isfinite().all()
        assert buffer[-512 * head_dim :].isnan().all()


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about rows that are not stored
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_scores(sign: int) -> None:
    """Scores of ±50,000: exp overflows unless the maximum is taken off and missing keys are masked."""
    q, k, v = draw_qkv(35, 70, 72, torch.float16)
    q, k = 60 + q.abs(), sign * (100 + k.abs())
    out, lse, *grads = evaluate(triton, [q, k, v], draw_grads(q), return_lse=True)
    exact_out, exact_lse = reference.attention_with_lse(q.double(), k.double(), v.double())
    assert exact_lse.abs().min() > 50_000
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)
    assert (out.double() - exact_out).norm() / exact_out.norm() < 0.05
    assert all(g.isfinite().all() for g in grads)


@needs_triton
def test_u_vit_learns_the_same_through_the_kernel() -> None:
    import uvit
    from uvit.layers import Attention

    config = uvit.UViTConfig(input_size=(1, 8, 8), patch_size=(1, 2, 2), width=64, depth=2, heads=2)
    model = uvit.build(config).to(DEVICE)
    x, time = draw(2, config.in_channels, 8, 8), torch.tensor([3.0, 500.0], device=DEVICE)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x, time).square().mean(), list(model.parameters())))

    expected = gradients()
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert len(attentions) == 3
    for m in attentions:
        m.attend = triton
    with FlopCounterMode(display=False) as counter:
        ours = gradients()
    assert OPS.attention_backward in counter.get_flop_counts()["Global"]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_operators_keep_their_promises() -> None:
    q, k, v = (x.requires_grad_() for x in draw_qkv(5, 9, 32))
    torch.library.opcheck(OPS.attention_forward, (q, k, v, 0.2))
    with torch.no_grad():
        out, lse = OPS.attention_forward(q, k, v, 0.2)
        for grad_lse in (None, draw(*lse.shape)):
            torch.library.opcheck(
                OPS.attention_backward, (draw(*out.shape), grad_lse, q, k, v, out, lse, 0.2)
            )


def test_operators_differentiate_either_output_alone() -> None:
    qkv = draw_qkv(5, 9, 32)
    for index in range(2):
        leaves = [x.clone().requires_grad_() for x in qkv]
        ours = OPS.attention_forward(*leaves, 0.2)[index]
        theirs = reference.attention_with_lse(*leaves, 0.2)[index]
        grad = draw(*ours.shape, seed=5)
        wanted = leaves[: 3 - index]  # lse does not depend on v
        torch.testing.assert_close(
            torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad)
        )


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_without_a_break(backend: str, return_lse: bool) -> None:
    torch.compiler.reset()
    function = functools.partial(attention, backend=backend, return_lse=return_lse)
    qkv = draw_qkv(17, 33, 40)
    grads = draw_grads(qkv[0])[: 1 + return_lse]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate(compiled, qkv, grads), evaluate(function, qkv, grads))


@pytest.mark.parametrize(("saved", "runs"), [(True, 1), (False, 2)])
def test_checkpointing_that_saves_the_operator_runs_it_once(saved: bool, runs: int) -> None:
    def policy(_, op, *args, **kwargs) -> CheckpointPolicy:
        keep = saved and op is OPS.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = (x.requires_grad_() for x in draw_qkv(5, 9, 32))
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(
            lambda q: OPS.attention_forward(q.sin(), k, v, 0.2)[0].cos(),
            q,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
        )
        out.sum().backward()
    product = 2 * 2 * 5 * 9 * 32  # FLOPs of one M × N × D product of both heads
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.attention_forward] == runs * 2 * product
    assert counts[OPS.attention_backward] == 5 * product


def test_auto_on_the_cpu_is_pytorchs() -> None:
    qkv = [x.cpu() for x in draw_qkv(17, 33, 40)]
    grad = draw(*qkv[0].shape, seed=7).cpu()
    theirs = evaluate(F.scaled_dot_product_attention, qkv, (grad,))
    assert_same(evaluate(attention, qkv, (grad,)), theirs)


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module._chosen.cache_clear()
    qkv = [x.cpu() for x in draw_qkv(5, 5, 40)]
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for return_lse in (False, False, True, True):
            attention(*qkv, return_lse=return_lse)
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == ["sdpa", "reference"]
    assert "head dim 40" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_autocast_casts_as_pytorch_does(dtype: torch.dtype) -> None:
    qkv = [x.cpu() for x in draw_qkv(5, 5, 40, dtype)]
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = attention(*qkv), F.scaled_dot_product_attention(*qkv)
        reference_out = attention(*qkv, backend="reference")
    assert out.dtype == reference_out.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert out.equal(theirs)


def test_shapes_alone_will_do() -> None:
    q, k, v = (torch.empty(1, 2, n, 40, device="meta") for n in (5, 9, 9))
    assert attention(q, k, v).shape == q.shape
    assert [x.shape for x in attention(q, k, v, return_lse=True)] == [q.shape, q.shape[:3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cudnn"}, "backend = 'cudnn'.*'sdpa'"),
        ({"backend": "sdpa", "return_lse": True}, "no log-sum-exp.*'auto'"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"q": (1, 2, 5)}, "must be .B, H, M, D"),
        ({"k": (1, 3, 5, 8), "v": (1, 3, 5, 8)}, "must be"),
        ({"v": (1, 2, 4, 8)}, "must be"),
        ({"k": (1, 2, 0, 8), "v": (1, 2, 0, 8)}, "at least 1"),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    shapes = {x: options.pop(x, (1, 2, 5, 8)) for x in "qkv"}
    with pytest.raises(ValueError, match=message):
        attention(*(draw(*shape) for shape in shapes.values()), **options)


def test_dtypes_must_agree() -> None:
    q, k, v = draw_qkv(5, 5, 32)
    with pytest.raises(ValueError, match=r"q torch.float32, k torch.float16.*must be one"):
        attention(q, k.half(), v)


@needs_triton
@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [(24, torch.float16, "head dim 24"), (136, torch.float16, "128"), (64, torch.float64, "float64")],
)
def test_kernels_refuse_what_they_cannot(head_dim: int, dtype: torch.dtype, message: str) -> None:
    qkv = draw_qkv(5, 5, head_dim, dtype)
    with pytest.raises(ValueError, match=f"backend = 'triton'.*{message}"):
        triton(*qkv)
    assert attention(*qkv).dtype == dtype


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dense, "can_launch", lambda device: False)
    module._chosen.cache_clear()
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        triton(*draw_qkv(5, 5, 64))
    module._chosen.cache_clear()


def test_merge_is_attention_to_both_halves() -> None:
    q, k, v = (x.double().requires_grad_() for x in draw_qkv(5, 12, 8))
    parts = [reference.attention_with_lse(q, k[:, :, s], v[:, :, s]) for s in (slice(4), slice(4, None))]
    merged, whole = merge(*parts[0], *parts[1]), reference.attention_with_lse(q, k, v)
    torch.testing.assert_close(merged, whole)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in pair), (q, k, v)) for pair in (merged, whole)]
    torch.testing.assert_close(*grads)


def test_merge_with_nothing_changes_nothing() -> None:
    out, lse = draw(1, 2, 5, 8), draw(1, 2, 5, seed=1)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    assert_same(merge(out, lse, *nothing), (out, lse))
    assert_same(merge(*nothing, *nothing), nothing)
    assert merge(out, lse, out.half(), lse)[0].dtype == torch.float32
