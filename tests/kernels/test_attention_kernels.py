"""The kernels of attention in Triton's interpreter, each form of them, against fp64.

bf16 is left out: the interpreter multiplies its bit patterns.
"""

import logging

import pytest
import torch
from torch import Tensor

from dtrain.kernels import attention_launch, reference
from dtrain.kernels.attention_launch import HEAD_DIMS
from dtrain.kernels.block_mask import BlockMask, block_causal, from_blocks, packed, tile_windows
from tests.kernels.attention_checks import (
    BOUND,
    DESCRIPTORS,
    DEVICE,
    FUSED,
    MARGIN,
    NAMES,
    SMALL,
    SPLIT,
    Kernels,
    assert_exact,
    assert_same,
    draw,
    draw_grads,
    draw_qkv,
    evaluate,
    needs_triton,
    poison,
    triton,
)

pytestmark = needs_triton

FORMS = pytest.mark.parametrize("kernels", [SPLIT, FUSED, DESCRIPTORS], ids=["split", "fused", "descriptors"])
MASKS = {
    "clips": packed((0, 5, 5, 137, 200), block=(64, 64)),
    "clips without keys": packed((0, 40, 60, 131), (0, 70, 70, 90), block=(32, 64)),
    "small blocks": packed((0, 33, 70), block=(16, 16)),
    "blocks of several tiles": packed((0, 150, 205), block=(128, 128)),
    "frames": block_causal(3, 35, prefix=3, block=(32, 16)),
    "windows": tile_windows((4, 6, 7), (2, 4, 4), (2, 4, 8), prefix=5),
    "nothing": from_blocks([40], [70], torch.zeros(1, 1, dtype=torch.bool), (32, 64)),
}


@FORMS
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (63, 63), (127, 127), (129, 129), (1, 129), (130, 1), (64, 128), (200, 200)]
)
def test_lengths(queries: int, keys: int, dtype: torch.dtype, kernels: Kernels) -> None:
    qkv = draw_qkv(queries, keys, 64, dtype, heads=2 if queries < 200 else 1)
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads), qkv, grads)


@FORMS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, kernels: Kernels) -> None:
    qkv = draw_qkv(19, 37, head_dim, torch.float16)
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads), qkv, grads)


@FORMS
@pytest.mark.parametrize("dtype", BOUND)
def test_scale(dtype: torch.dtype, kernels: Kernels) -> None:
    qkv = draw_qkv(33, 70, 72, dtype)
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads, scale=0.3), qkv, grads, scale=0.3)


@pytest.mark.parametrize(
    "kernels", [SPLIT, FUSED, DESCRIPTORS, SMALL], ids=["split", "fused", "descriptors", "small"]
)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kernels: Kernels) -> None:
    mask = MASKS[name].to(DEVICE)
    qkv = draw_qkv(*mask.shape, 72, torch.float16, heads=1)
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads, mask=mask), qkv, grads, mask=mask)


@pytest.mark.parametrize("name", ["clips", "clips without keys"])
def test_masks_in_fp32(name: str) -> None:
    mask = MASKS[name].to(DEVICE)
    qkv = draw_qkv(*mask.shape, 32, heads=1)
    grads = draw_grads(qkv[0])
    assert_exact(FUSED(qkv, grads, mask=mask), qkv, grads, mask=mask)


@FORMS
def test_batches_share_a_mask(kernels: Kernels) -> None:
    mask = MASKS["frames"].to(DEVICE)
    tokens = mask.shape[0]
    qkv = [draw(2, 1, tokens, 40, seed=s, dtype=torch.float16) for s in range(3)]
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads, mask=mask), qkv, grads, mask=mask)


@FORMS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaNs
def test_a_clip_does_not_hear_of_another(kernels: Kernels) -> None:
    """A NaN stays in its clip, although the tiles of its neighbours reach into it."""
    mask = packed((0, 40, 75, 130), block=(32, 32)).to(DEVICE)
    qkv = draw_qkv(130, 130, 72, torch.float16)
    clean = kernels(qkv, draw_grads(qkv[0]), mask=mask)
    for x in qkv:
        x[:, :, 40:75] = torch.nan
    dirty = kernels(qkv, draw_grads(qkv[0]), mask=mask)
    for name, ours, wanted in zip(NAMES, dirty, clean, strict=True):
        for part in (slice(0, 40), slice(75, 130)):
            assert ours[:, :, part].equal(wanted[:, :, part]), name
        assert ours[:, :, 40:75].isnan().all(), name


def test_packed_views_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_qkv = draw(2, 70, 3, 3, 40, dtype=torch.float16).requires_grad_()  # (B, N, 3, H, D)
    q, k, v = packed_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    grad = draw(2, 3, 70, 40, seed=1, dtype=torch.float16)
    expected = triton(*plain)
    expected_grads = torch.autograd.grad(expected, plain, grad)

    monkeypatch.setattr(Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy"))
    out = triton(q, k, v)
    (grad_packed,) = torch.autograd.grad(out, packed_qkv, grad)
    assert out.equal(expected)
    assert all(a.equal(b) for a, b in zip(grad_packed.permute(2, 0, 3, 1, 4), expected_grads, strict=True))
    assert out.transpose(1, 2).is_contiguous()  # joining the heads copies nothing


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


def test_offsets_beyond_31_bits() -> None:
    tokens, stride = 129, 2**24 + 8
    # pages never touched cost nothing
    memory = torch.empty(tokens * stride, dtype=torch.float16, device=DEVICE)
    far = [memory.as_strided((1, 1, tokens, 32), (0, 0, stride, 1), 32 * i) for i in range(3)]
    assert (tokens - 1) * stride >= 2**31
    near = draw_qkv(tokens, tokens, 32, torch.float16, heads=1)
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    grads = draw_grads(near[0])[:1]
    assert_same(evaluate(triton, far, grads), evaluate(triton, near, grads))


def test_rows_of_a_packed_qkv_start_at_16_bytes_for_all_the_compiler_knows() -> None:
    q = draw(1, 5, 3, 2, 72).permute(2, 0, 3, 1, 4)[0]
    assert attention_launch._strides([q]) == (8, [9, 9, 54])
    assert attention_launch._strides([q[..., :71], draw(1, 2, 5, 71)])[0] == 1


@pytest.mark.parametrize("dims", [(1, 1, 1, 1), (1, 2, 1, 72), (1, 1, 35, 1)])
def test_expanded_gradients(dims: tuple[int, ...]) -> None:
    qkv = draw_qkv(35, 35, 72, torch.float16)
    grad = draw(*dims, dtype=torch.float16).expand_as(qkv[0])
    grad_lse = draw(1, 2, 1).expand(1, 2, 35)
    ours = evaluate(triton, qkv, (grad, grad_lse), return_lse=True)
    assert_same(ours, evaluate(triton, qkv, (grad.contiguous(), grad_lse.contiguous()), return_lse=True))


@FORMS
@pytest.mark.parametrize(("tokens", "head_dim"), [(129, 64), (70, 72), (1, 120)])
def test_every_element_is_written_and_none_beyond(
    tokens: int, head_dim: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_poisoned(draw_qkv(tokens, tokens, head_dim, torch.float16), None, kernels, monkeypatch)


@FORMS
@pytest.mark.parametrize("name", ["clips without keys", "windows", "nothing"])
def test_every_element_is_written_under_a_mask(
    name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = MASKS[name].to(DEVICE)
    check_poisoned(draw_qkv(*mask.shape, 72, torch.float16), mask, kernels, monkeypatch)


def check_poisoned(
    qkv: list[Tensor], mask: BlockMask | None, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = poison(monkeypatch)
    grads = draw_grads(qkv[0])
    assert_exact(kernels(qkv, grads, mask=mask), qkv, grads, mask=mask)
    assert len(buffers) == 6 + (kernels.form == "fused")  # out, lse, dq, dk, dv, delta; sums of dq
    for buffer in buffers:
        assert not buffer[:-MARGIN].isnan().any()
        assert buffer[-MARGIN:].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about rows that are not stored
@FORMS
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_scores(sign: int, kernels: Kernels) -> None:
    """Scores of ±50,000: exp overflows unless the maximum is taken off and missing keys are masked."""
    q, k, v = draw_qkv(35, 70, 72, torch.float16)
    q, k = 60 + q.abs(), sign * (100 + k.abs())
    out, lse, *grads = kernels([q, k, v], draw_grads(q))
    exact_out, exact_lse = reference.attention_with_lse(q.double(), k.double(), v.double())
    assert exact_lse.abs().min() > 50_000
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)
    assert (out.double() - exact_out).norm() / exact_out.norm() < 0.05
    assert all(g.isfinite().all() for g in grads)


def test_rows_that_descriptors_cannot_read_are_read_by_pointers_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attention_launch._say_pointers.cache_clear()
    qkv = draw_qkv(35, 35, 72, torch.float16)
    odd = [torch.cat([x, x[..., :1]], dim=-1)[..., :72] for x in qkv]  # rows of 73
    grads = draw_grads(qkv[0])
    with caplog.at_level(logging.INFO, logger=attention_launch.__name__):
        ours, _again = DESCRIPTORS(odd, grads), DESCRIPTORS(odd, grads)
    assert_exact(ours, qkv, grads)
    names = [f"attention {name}:" for name in ("forward", "backward_dq", "backward_dkdv")]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 3
    assert all(text.startswith(name) for text, name in zip(said, names, strict=True))
