"""The reference ops agree with their equations, forwards and backwards, in every precision they promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.kernels import reference


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 8), (17, 5, 72), (66, 66, 64)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_pytorchs(queries: int, keys: int, head_dim: int, scale: float | None) -> None:
    qkv = [_draw(2, 3, tokens, head_dim, seed=s) for s, tokens in enumerate((queries, keys, keys))]
    ours, lse = reference.attention_with_lse(*qkv, scale)
    theirs = F.scaled_dot_product_attention(*qkv, scale=scale)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(_gradients(ours, qkv), _gradients(theirs, qkv))
    scores = torch.einsum("bhmd,bhnd->bhmn", *qkv[:2]) * (head_dim**-0.5 if scale is None else scale)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_keeps_the_dtype_and_an_fp32_log_sum_exp(dtype: torch.dtype) -> None:
    qkv = [_draw(1, 2, 9, 8, seed=s, dtype=dtype) for s in range(3)]
    out, lse = reference.attention_with_lse(*qkv)
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    grads = reference.attention_backward(out, None, *qkv, out, lse, 1.0)
    assert [g.dtype for g in grads] == [dtype] * 3


@pytest.mark.parametrize("with_lse", [True, False])
def test_attention_backward_is_autograds(with_lse: bool) -> None:
    qkv = [_draw(2, 3, tokens, 8, seed=s) for s, tokens in enumerate((17, 5, 5))]
    out, lse = reference.attention_with_lse(*qkv, 0.3)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    ours = reference.attention_backward(grad_out, grad_lse, *qkv, out, lse, 0.3)
    loss = (out * grad_out).sum() + ((lse * grad_lse).sum() if grad_lse is not None else 0)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, qkv))


def test_skip_linear_is_the_linear_of_the_concatenation() -> None:
    inputs = [_draw(2, 5, 6), _draw(2, 5, 6, seed=1), _draw(6, 12, seed=2), _draw(6, seed=3)]
    x, skip, weight, bias = inputs
    ours = reference.skip_linear(*inputs)
    plain = F.linear(torch.cat([x, skip], dim=-1), weight, bias)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(_gradients(ours, inputs), _gradients(plain, inputs))


def test_skip_linear_takes_strided_inputs_and_any_leading_dims() -> None:
    x, skip = _draw(6, 5, 2, 3).permute(2, 3, 1, 0), _draw(2, 3, 10, 6)[:, :, ::2]
    weight, bias = _draw(4, 12), _draw(4)
    plain = F.linear(torch.cat([x, skip], dim=-1), weight, bias)
    torch.testing.assert_close(reference.skip_linear(x, skip, weight, bias), plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_skip_linear_in_bf16(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = [
        _draw(*shape, seed=s, dtype=dtype)
        for s, shape in enumerate([(2, 5, 32), (2, 5, 32), (32, 64), (32,)])
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = reference.skip_linear(*inputs)
    x, skip, weight, bias = (t.double() for t in inputs)
    exact = F.linear(torch.cat([x, skip], dim=-1), weight, bias)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() / exact.norm() < 2**-7
    assert [g.dtype for g in _gradients(out, inputs)] == [dtype] * 4


def test_rms_norm_is_its_equation_and_keeps_the_dtype() -> None:
    x, weight = _draw(2, 3, 8), _draw(8, seed=1)
    ours = reference.rms_norm(x, weight, 1e-6)
    equation = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(ours, equation)
    torch.testing.assert_close(_gradients(ours, [x, weight]), _gradients(equation, [x, weight]))
    assert reference.rms_norm(x.bfloat16(), weight.float(), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("head_dim", "pairs"), [(6, (1, 1, 1)), (8, (2, 1, 1)), (64, (12, 10, 10)), (72, (12, 12, 12))]
)
def test_rope_gives_each_axis_its_share_of_the_pairs(head_dim: int, pairs: tuple[int, int, int]) -> None:
    angles = reference.rope_angles((2, 3, 4), head_dim).view(2, 3, 4, -1)
    assert angles.shape[-1] == head_dim // 2
    for axis, part in enumerate(angles.split(pairs, dim=-1)):
        step = part.movedim(axis, 0)
        assert (step[0] == 0).all()
        # The first pair of an axis turns by one radian a step, and no pair turns along another axis.
        assert (step[1, ..., 0] == 1).all()
        assert (step[1] == step[1, 0, 0]).all()


def test_rope_frequencies_fall_geometrically() -> None:
    time = reference.rope_angles((2, 1, 1), 64, theta=100.0)[1, :12].double()
    torch.testing.assert_close(time, 100.0 ** (-torch.arange(12) / 12).double(), rtol=1e-6, atol=0)


def test_rope_scores_depend_on_distances_only() -> None:
    q, k = _draw(1, 24), _draw(1, 24, seed=1)
    angles = reference.rope_angles((6, 6, 6), 24).double().view(6, 6, 6, -1)

    def score(at: tuple[int, int, int], to: tuple[int, int, int]) -> Tensor:
        a, b = angles[at][None], angles[to][None]
        turned = reference.apply_rope(q, a.cos(), a.sin()), reference.apply_rope(k, b.cos(), b.sin())
        return (turned[0] * turned[1]).sum()

    near, far = score((0, 1, 2), (1, 1, 0)), score((4, 3, 5), (5, 3, 3))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-6)
    assert (near - score((0, 1, 2), (0, 1, 0))).abs() > 1e-3


def test_rope_keeps_norms_and_dtype_and_extends() -> None:
    x = _draw(2, 3, 24, 12)
    angles = reference.rope_angles((2, 3, 4), 12)
    turned = reference.apply_rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert reference.apply_rope(x.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16
    larger = reference.rope_angles((4, 5, 6), 12).view(4, 5, 6, -1)
    assert larger[:2, :3, :4].flatten(0, 2).equal(angles)
