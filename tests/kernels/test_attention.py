"""The operators of attention, the choice of who serves, and what they refuse."""

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
from dtrain.kernels import attention_backward, attention_choice, attention_launch, reference, tiles
from dtrain.kernels.attention import attention, merge
from dtrain.kernels.block_mask import BlockMask, packed
from dtrain.kernels.launch import arch_of
from dtrain.kernels.tiles import Choice
from tests.kernels.attention_checks import (
    DEVICE,
    assert_same,
    draw,
    draw_grads,
    draw_qkv,
    evaluate,
    needs_triton,
    triton,
)

OPS = torch.ops.dtrain
MASK = packed((0, 3, 5), (0, 9, 9), block=(16, 16)).to(DEVICE)
DENSE = module.flatten(None)


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


@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "masked"])
def test_operators_keep_their_promises(mask: BlockMask | None) -> None:
    lists = module.flatten(mask)
    q, k, v = (x.requires_grad_() for x in draw_qkv(5, 9, 32))
    torch.library.opcheck(OPS.attention_forward, (q, k, v, 0.2, *lists))
    with torch.no_grad():
        out, lse = OPS.attention_forward(q, k, v, 0.2, *lists)
        for grad_lse in (None, draw(*lse.shape)):
            saved = (q, k, v, out, lse, 0.2, *lists)
            torch.library.opcheck(OPS.attention_backward, (draw(*out.shape), grad_lse, *saved))


def test_operators_differentiate_either_output_alone() -> None:
    qkv = draw_qkv(5, 9, 32)
    for index in range(2):
        leaves = [x.clone().requires_grad_() for x in qkv]
        ours = OPS.attention_forward(*leaves, 0.2, *DENSE)[index]
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
            lambda q: OPS.attention_forward(q.sin(), k, v, 0.2, *DENSE)[0].cos(),
            q,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
        )
        out.sum().backward()
    product = 2 * 2 * 5 * 9 * 32  # FLOPs of one M × N × D product of both heads
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.attention_forward] == runs * 2 * product
    assert counts[OPS.attention_backward] == 5 * product


BACKENDS = ["auto", "sdpa", "reference", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_obeys_a_mask(backend: str) -> None:
    """Clips of 17, 0 and 16 queries and of 20, 13 and 0 keys: the last queries see none."""
    mask = packed((0, 17, 17, 33), (0, 20, 33, 33), block=(16, 16)).to(DEVICE)
    qkv = draw_qkv(33, 33, 40)
    grads = draw_grads(qkv[0])[:1]
    function = functools.partial(attention, mask=mask)
    ours = evaluate(function, qkv, grads, backend=backend)
    torch.testing.assert_close(ours, evaluate(function, qkv, grads, backend="reference"))
    parts = [x[:, :, :17] if i == 0 else x[:, :, :20] for i, x in enumerate(qkv)]
    torch.testing.assert_close(ours[0][:, :, :17], attention(*parts))
    assert not any(x[:, :, 17:].any() for x in ours[:2])
    assert not ours[3][:, :, 20:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_compile_without_a_break_once_for_all_sizes(backend: str) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *qkv, mask: attention(*qkv, mask=mask, backend=backend), backend=count, fullgraph=True
    )
    for cuts in ((0, 9, 40), (0, 30, 48, 70), (0, 20, 50), (0, 8, 16, 24, 90)):
        mask = packed(cuts, block=(16, 16)).to(DEVICE)
        qkv = draw_qkv(cuts[-1], cuts[-1], 40)
        torch.testing.assert_close(compiled(*qkv, mask=mask), attention(*qkv, mask=mask, backend=backend))
    assert len(graphs) <= 2  # for the first sizes, and for all others


def test_flops_of_a_mask_are_those_of_its_pairs() -> None:
    mask = packed((0, 17, 33), block=(16, 16)).to(DEVICE)
    qkv = [x.requires_grad_() for x in draw_qkv(33, 33, 40)]
    with FlopCounterMode(display=False) as counter:
        OPS.attention_forward(*qkv, 0.2, *module.flatten(mask))[0].sum().backward()
    product = 2 * 2 * (17 * 17 + 16 * 16) * 40
    counts = counter.get_flop_counts()["Global"]
    assert (counts[OPS.attention_forward], counts[OPS.attention_backward]) == (2 * product, 5 * product)


def test_a_mask_must_fit() -> None:
    with pytest.raises(ValueError, match=r"q .*the mask is for 33 queries and 40 keys"):
        attention(*draw_qkv(33, 33, 40), mask=packed((0, 33), (0, 40)))
    with pytest.raises(ValueError, match=r"q is on cpu, the mask on meta: use mask.to"):
        attention(*(x.cpu() for x in draw_qkv(33, 33, 40)), mask=packed((0, 33)).to("meta"))


@pytest.mark.parametrize("deterministic", [False, True])
@needs_triton
def test_the_table_chooses_the_backward_and_determinism_overrules_it(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    kernel = attention_backward.backward
    monkeypatch.setattr(attention_backward, "backward", lambda *args: used.append(args[-1]) or kernel(*args))
    row = Choice(head_dim=64, keys=100, sparse=False, backend="triton", backward="fused")
    monkeypatch.setattr(tiles, "CHOICES", {arch_of(DEVICE): (row,)})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    for keys, head_dim in ((100, 64), (101, 64), (100, 72)):
        qkv = draw_qkv(5, keys, head_dim)
        evaluate(triton, qkv, draw_grads(qkv[0])[:1])
    assert used == ["split" if deterministic else "fused", "split", "split"]


def test_the_table_chooses_the_backend_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Choice(64, 1000, False, "sdpa", "split"), Choice(64, 4000, False, "triton", "fused"))
    monkeypatch.setattr(tiles, "CHOICES", {"sm_90": rows})
    assert tiles.key_steps("sm_90", 64, False) == (1000, 4000)
    chosen = [tiles.choice("sm_90", d, n, False) for d, n in ((64, 1000), (40, 1001), (64, 4001), (72, 5))]
    assert chosen == [*rows, None, None]
    assert tiles.choice("sm_90", 64, 10, sparse=True) is tiles.choice("sm_80", 64, 10, False) is None


def test_auto_on_the_cpu_is_pytorchs() -> None:
    qkv = [x.cpu() for x in draw_qkv(17, 33, 40)]
    grad = draw(*qkv[0].shape, seed=7).cpu()
    theirs = evaluate(F.scaled_dot_product_attention, qkv, (grad,))
    assert_same(evaluate(attention, qkv, (grad,)), theirs)


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    attention_choice._chosen.cache_clear()
    attention_choice._say.cache_clear()
    qkv = [x.cpu() for x in draw_qkv(5, 5, 40)]
    with caplog.at_level(logging.INFO, logger=attention_choice.__name__):
        for return_lse in (False, False, True, True):
            attention(*qkv, return_lse=return_lse)
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == [
        "sdpa (not on a GPU)",
        "reference (sdpa returns no log-sum-exp)",
    ]
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
    monkeypatch.setattr(attention_launch, "can_launch", lambda device: False)
    attention_choice._chosen.cache_clear()
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        triton(*draw_qkv(5, 5, 64))
    attention_choice._chosen.cache_clear()


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
