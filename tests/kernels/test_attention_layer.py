"""The layer's operator in Triton's interpreter, against its parts in fp64; who serves, and what is kept."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dtrain.kernels import attention_layer, reference
from dtrain.kernels.attention import flatten
from dtrain.kernels.attention_layer import qkv_attention
from dtrain.kernels.block_mask import BlockMask, packed
from dtrain.kernels.launch import can_launch
from tests.kernels.attention_checks import DEVICE, draw, needs_triton

OPS = torch.ops.dtrain
BOUND = {torch.float16: 1e-3, torch.float32: 3e-6}
NAMES = ("q_weight", "k_weight", "cos", "sin")
PARTS = [("q_weight", "k_weight", "cos", "sin"), ("q_weight", "k_weight"), ("cos", "sin"), ("k_weight",), ()]

triton = functools.partial(qkv_attention, backend="triton")
plain = functools.partial(qkv_attention, backend="reference")


def draw_how(
    tokens: int, head_dim: int, dtype: torch.dtype = torch.float32, parts: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    angles = 7 * draw(tokens, head_dim // 2, seed=3)
    how = {
        "q_weight": 1 + 0.3 * draw(head_dim, seed=1, dtype=dtype),
        "k_weight": 1 + 0.3 * draw(head_dim, seed=2, dtype=dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return {name: how[name] for name in parts}


def evaluate(function: Any, qkv: Tensor, how: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """out and the gradients by qkv and by the weights that there are."""
    leaves = {name: how[name].detach().requires_grad_() for name in NAMES[:2] if name in how}
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, **how | leaves)
    found = torch.autograd.grad(out, [qkv, *leaves.values()], grad)
    return dict(zip(("out", "qkv", *leaves), (out, *found), strict=True))


def clips(*lengths: int) -> BlockMask:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return packed(ends, block=(16, 16)).to(DEVICE)


def draw_grad(qkv: Tensor) -> Tensor:
    batch, tokens, _, heads, width = qkv.shape
    return draw(batch, tokens, heads * width, seed=7, dtype=qkv.dtype)


def assert_exact(qkv: Tensor, how: dict[str, Any]) -> None:
    ours = evaluate(triton, qkv, how, draw_grad(qkv))
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in how.items()}
    exact = evaluate(plain, qkv.double(), wide, draw_grad(qkv).double())
    assert ours.keys() == exact.keys()
    for name, mine in ours.items():
        error = (mine.double() - exact[name]).norm() / exact[name].norm()
        assert error < BOUND[qkv.dtype], f"{name}: {error:.1e}"
        assert mine.dtype == how.get(name, qkv).dtype


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert {name: x.equal(theirs[name]) for name, x in ours.items()} == dict.fromkeys(theirs, True)


@needs_triton
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_each_part_alone_and_together(parts: tuple[str, ...], dtype: torch.dtype) -> None:
    assert_exact(draw(2, 37, 3, 3, 64, dtype=dtype), draw_how(37, 64, dtype, parts))


@needs_triton
@pytest.mark.parametrize(("tokens", "head_dim"), [(2, 128), (63, 32), (129, 72), (19, 40), (70, 96)])
def test_sizes(tokens: int, head_dim: int) -> None:
    qkv = draw(1, tokens, 3, 2, head_dim, dtype=torch.float16)
    assert_exact(qkv, draw_how(tokens, head_dim, torch.float16) | {"eps": 0.1, "scale": 0.2})


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_real_sizes_in_bf16(head_dim: int) -> None:
    """No more than twice the error of PyTorch's own attention after several passes."""
    qkv, how = draw(1, 2500, 3, 4, head_dim, dtype=torch.bfloat16), draw_how(2500, head_dim, torch.bfloat16)
    wide = {name: x.double() for name, x in how.items()}
    exact = evaluate(plain, qkv.double(), wide, draw_grad(qkv).double())
    theirs = evaluate(plain, qkv, how, draw_grad(qkv))
    packed_sdpa = evaluate(functools.partial(qkv_attention, backend="sdpa"), qkv, how, draw_grad(qkv))
    for ours in (evaluate(triton, qkv, how, draw_grad(qkv)), packed_sdpa):
        for name, truth in exact.items():
            assert (ours[name] - truth).norm() <= 2 * (theirs[name] - truth).norm(), name


@needs_triton
def test_masks() -> None:
    """Clips one after the other give what each gives alone."""
    qkv, how, mask = draw(2, 54, 3, 2, 64), draw_how(54, 64), clips(20, 1, 33)
    assert_exact(qkv, how | {"mask": mask})
    parts = [
        triton(qkv[:, s], **{n: x[s] if n in ("cos", "sin") else x for n, x in how.items()})
        for s in (slice(20), slice(20, 21), slice(21, 54))
    ]
    torch.testing.assert_close(triton(qkv, **how, mask=mask), torch.cat(parts, dim=1))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_masks_of_others(backend: str) -> None:
    qkv, how, mask = draw(2, 9, 3, 2, 40), draw_how(9, 40), clips(4, 5)
    ours = evaluate(
        functools.partial(qkv_attention, backend=backend), qkv, how | {"mask": mask}, draw_grad(qkv)
    )
    halves = [
        qkv_attention(qkv[:, s], **{n: x[s] if n in ("cos", "sin") else x for n, x in how.items()})
        for s in (slice(4), slice(4, 9))
    ]
    torch.testing.assert_close(ours["out"], torch.cat(halves, dim=1))


@needs_triton
@pytest.mark.parametrize("view", ["heads first", "rows of 73", "last dim apart"])
def test_any_strides(view: str) -> None:
    qkv = draw(2, 35, 3, 2, 72, dtype=torch.float16)
    strided = {
        "heads first": lambda x: x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
        "rows of 73": lambda x: torch.cat([x, x[..., :1]], dim=-1)[..., :72],
        "last dim apart": lambda x: x.mT.contiguous().mT,
    }[view](qkv)
    assert strided.stride() != qkv.stride()
    how, grad = draw_how(35, 72, torch.float16), draw_grad(qkv)
    assert_same(evaluate(triton, strided, how, grad), evaluate(triton, qkv, how, grad))


@needs_triton
def test_expanded_gradients() -> None:
    qkv, how = draw(1, 35, 3, 2, 72, dtype=torch.float16), draw_how(35, 72, torch.float16)
    grad = draw(1, 1, 1, dtype=torch.float16).expand(1, 35, 144)
    assert_same(evaluate(triton, qkv, how, grad), evaluate(triton, qkv, how, grad.contiguous()))


@needs_triton
def test_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cat", lambda *_, **__: pytest.fail("joined"))
    monkeypatch.setattr(torch, "stack", lambda *_, **__: pytest.fail("joined"))
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy"))
    qkv, how = draw(2, 19, 3, 2, 64, dtype=torch.float16), draw_how(19, 64, torch.float16)
    found = evaluate(triton, qkv, how, draw_grad(qkv))
    assert found["out"].is_contiguous()
    assert found["qkv"].is_contiguous()


@needs_triton
def test_it_keeps_its_inputs_its_output_and_the_log_sum_exps() -> None:
    def kept(backend: str) -> int:
        storages: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = qkv_attention(qkv, **how, backend=backend)  # noqa: F841  (alive while it is counted)
        return sum(storages.values())

    qkv, how = draw(2, 35, 3, 2, 64).requires_grad_(), draw_how(35, 64)
    lse_bytes = 2 * 2 * 35 * 4
    given = qkv.nbytes + sum(x.nbytes for x in how.values())
    assert kept("triton") == given + qkv.nbytes // 3 + lse_bytes
    assert kept("sdpa") > given + qkv.nbytes


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize(("parts", "masked"), [(PARTS[0], False), (PARTS[-1], True)])
def test_operators_keep_their_promises(
    parts: tuple[str, ...], masked: bool, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not interpreted:
        monkeypatch.setattr(attention_layer, "refusal", lambda *_: "not here")
    mask = clips(2, 3) if masked else None
    given = draw_how(5, 32, parts=parts)
    how = [given.get(name) for name in NAMES]
    leaves = [x if x is None else x.requires_grad_(i < 2) for i, x in enumerate(how)]
    qkv = draw(2, 5, 3, 2, 32).requires_grad_()
    torch.library.opcheck(OPS.qkv_attention_forward, (qkv, *leaves, 1e-6, 0.2, *flatten(mask)))
    with torch.no_grad():
        out, lse = OPS.qkv_attention_forward(qkv, *how, 1e-6, 0.2, *flatten(mask))
        for grad_lse in (None, draw(*lse.shape)):
            args = draw(*out.shape, seed=5), grad_lse, qkv, out, lse, *how, 1e-6, 0.2, *flatten(mask)
            torch.library.opcheck(OPS.qkv_attention_backward, args)


@pytest.mark.parametrize("interpreted", [pytest.param(True, marks=needs_triton), False])
def test_the_log_sum_exps_have_a_gradient_too(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted:
        monkeypatch.setattr(attention_layer, "refusal", lambda *_: "not here")
    how = draw_how(9, 32)
    qkv, weights = draw(1, 9, 3, 2, 32), [how[name].requires_grad_() for name in NAMES[:2]]
    q, k, v = reference.qk_norm_rope(qkv.requires_grad_(), **how, eps=1e-6)
    pairs = (
        OPS.qkv_attention_forward(qkv, *how.values(), 1e-6, 0.2, *flatten(None)),
        reference.attention_with_lse(q, k, v, 0.2),
    )
    for index in range(2):
        ours, theirs = pairs[0][index], pairs[1][index]
        theirs = theirs.transpose(1, 2) if index == 0 else theirs
        grad = draw(*ours.shape, seed=5)
        mine, exact = (
            torch.autograd.grad(x, [qkv, *weights], grad, retain_graph=True) for x in (ours, theirs)
        )
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()
    function = functools.partial(qkv_attention, backend=backend)
    qkv, how = draw(1, 17, 3, 2, 40), draw_how(17, 40)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    grad = draw_grad(qkv)
    torch.testing.assert_close(evaluate(compiled, qkv, how, grad), evaluate(function, qkv, how, grad))


@pytest.mark.parametrize(("saved", "runs"), [(True, 1), (False, 2)])
def test_checkpointing_that_saves_the_operator_runs_it_once(saved: bool, runs: int) -> None:
    def policy(_, op, *args, **kwargs) -> CheckpointPolicy:
        keep = saved and op is OPS.qkv_attention_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    qkv, how = draw(1, 9, 3, 2, 32).requires_grad_(), draw_how(9, 32)
    with FlopCounterMode(display=False) as counter:
        out = checkpoint(
            lambda x: OPS.qkv_attention_forward(x.sin(), *how.values(), 1e-6, 0.2, *flatten(None))[0].cos(),
            qkv,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
        )
        out.sum().backward()
    product = 2 * 2 * 9 * 9 * 32  # FLOPs of one N × N × D product of both heads
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.qkv_attention_forward] == runs * 2 * product
    assert counts[OPS.qkv_attention_backward] == 5 * product


@needs_triton
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_of_parameters_and_activations_may_differ(autocast: bool) -> None:
    """Weights in fp32 over 16-bit activations, as autocast leaves them, or cast along, as FSDP2 does."""
    qkv, how = draw(1, 19, 3, 2, 64, dtype=torch.float16), draw_how(19, 64)
    with torch.autocast(DEVICE.type, torch.float16, enabled=autocast):
        found = evaluate(triton, qkv.float() if autocast else qkv, how, draw_grad(qkv))
    assert found["out"].dtype == torch.float16
    assert found["qkv"].dtype == (torch.float32 if autocast else torch.float16)
    assert [found[name].dtype for name in NAMES[:2]] == [torch.float32] * 2
    expected = evaluate(triton, qkv, how, draw_grad(qkv))
    assert all(found[name].half().equal(x.half()) for name, x in expected.items())


def test_on_the_cpu_it_is_what_its_parts_are() -> None:
    qkv, how = draw(1, 19, 3, 2, 64).cpu(), {name: x.cpu() for name, x in draw_how(19, 64).items()}

    def parts(qkv: Tensor, **how: Tensor) -> Tensor:
        q, k, v = reference.qk_norm_rope(qkv, **how, eps=1e-6)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    grad = draw_grad(qkv).cpu()
    assert_same(evaluate(qkv_attention, qkv, how, grad), evaluate(parts, qkv, how, grad))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"q_weight \(4,\): must be \(8,\)"):
        qkv_attention(draw(1, 5, 3, 2, 8), q_weight=draw(4))
    with pytest.raises(ValueError, match=r"backend = 'cudnn'.*'sdpa'"):
        qkv_attention(draw(1, 5, 3, 2, 8), backend="cudnn")
    for scale in (0.0, -1.0):
        for backend in ("auto", "triton") if can_launch(DEVICE) else ("auto",):
            with pytest.raises(ValueError, match=f"scale = {scale}"):
                qkv_attention(draw(1, 5, 3, 2, 32), scale=scale, backend=backend)


def test_shapes_alone_will_do() -> None:
    qkv = torch.empty(2, 5, 3, 2, 40, device="meta")
    assert qkv_attention(qkv, q_weight=torch.empty(40, device="meta")).shape == (2, 5, 80)


def small_u_vit() -> tuple[Any, tuple[Tensor, Tensor], list[Any]]:
    """A model with rotary positions and norms, its inputs, and its attentions."""
    import uvit
    from uvit.layers import Attention

    config = uvit.UViTConfig(
        input_size=(2, 8, 8), patch_size=(1, 2, 2), width=64, depth=2, heads=2, qk_norm=True, positions="rope"
    )
    torch.manual_seed(0)
    model = uvit.build(config).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    inputs = draw(2, config.in_channels, 2, 8, 8), torch.tensor([3.0, 500.0], device=DEVICE)
    return model, inputs, [m for m in model.modules() if isinstance(m, Attention)]


@needs_triton
def test_u_vit_learns_the_same_through_the_operator() -> None:
    model, inputs, attentions = small_u_vit()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(*inputs).square().mean(), list(model.parameters())))

    expected = gradients()
    for m in attentions:
        m.attention_backend = "triton"
    with FlopCounterMode(display=False) as counter:
        ours = gradients()
    assert OPS.qkv_attention_backward in counter.get_flop_counts()["Global"]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_u_vit_lets_its_attention_be_replaced() -> None:
    model, inputs, attentions = small_u_vit()
    expected = model(*inputs)
    seen: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for m in attentions:
        m.attend = attend
    torch.testing.assert_close(model(*inputs), expected)
    assert seen == [(2, 2, 33, 32)] * len(attentions)
