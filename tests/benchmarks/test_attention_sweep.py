"""The sweep of attention: its truth, its gates, its budget, its file and its table."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention import contestants, exact, norm_rope
from benchmarks.attention.exact import exact_attention
from benchmarks.attention.layer import Layer
from benchmarks.attention.operation import dense_plans, window_plans
from benchmarks.attention.plans import attention_plans
from benchmarks.attention.plot import plot
from benchmarks.attention.problem import Backward, Forward, Problem, Shape
from benchmarks.attention.settings import settings_for
from benchmarks.result import Measurement, Result
from benchmarks.sweep.errors import error_ratio
from benchmarks.sweep.op import Inputs, Step
from benchmarks.sweep.run import Sweep, read_sweep, run_plans
from benchmarks.sweep.table import sound
from dtrain.kernels.block_mask import packed, tile_windows

TINY = Shape(batch=2, heads=3, tokens=20, head_dim=8)


def wide(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_the_truth_is_that_of_autograd_in_any_slices(
    rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = 20, 13
    q, k, v = (wide(i, 2, n, 8).requires_grad_() for i, n in enumerate((queries, keys, keys)))
    grad = wide(9, 2, queries, 8)
    allowed = None
    if masked:
        allowed = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.4
        allowed[3] = False
    monkeypatch.setattr(exact, "_SLICE_BYTES", rows * 8 * 2 * keys)

    scores = q @ k.mT / 8**0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e300)
    p = scores.softmax(-1) * (1 if allowed is None else allowed.any(-1, keepdim=True))
    wanted = p @ v, *torch.autograd.grad(p @ v, (q, k, v), grad)

    out, lse = exact.forward(q.detach(), k.detach(), v.detach(), allowed)
    got = out, *exact.gradients(grad, q.detach(), k.detach(), v.detach(), allowed)
    by_autograd = exact_attention(q, k, v, allowed)
    also = by_autograd, *torch.autograd.grad(by_autograd, (q, k, v), grad)
    for x, y, want in zip(got, also, wanted, strict=True):
        torch.testing.assert_close(x, want)
        torch.testing.assert_close(y, want)
    seen = slice(None) if allowed is None else allowed.any(-1)
    torch.testing.assert_close(lse[:, seen], scores.logsumexp(-1)[:, seen])
    assert allowed is None or lse[:, 3].eq(-torch.inf).all()


def test_flops_are_those_that_two_products_need() -> None:
    q, k, v = Problem(TINY, "cpu", torch.float32).qkv
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == TINY.flops()
    assert TINY.flops(pairs=7) == TINY.flops() * 7 // TINY.tokens**2


def test_gates_notice_what_is_wrong_or_nan() -> None:
    problem = Problem(TINY, "cpu", torch.float32)
    right = F.scaled_dot_product_attention
    base = Forward(problem, right)
    assert error_ratio(Forward(problem, right), base) == 1
    assert error_ratio(Forward(problem, lambda q, k, v: right(q, k, v) * 1.001), base) > 100
    base = Backward(problem, right)
    assert error_ratio(Backward(problem, right), base) == 1
    dq, dk, dv = base()
    for wrong in ((dq, dk, dv * 1.001), (dq * torch.nan, dk, dv), (dk, dq, dv)):
        assert not error_ratio(Backward(problem, right, lambda wrong=wrong: wrong), base) <= 2


def test_the_layers_gate_notices_a_wrong_weight() -> None:
    settings = dataclasses.replace(settings_for("cpu", quick=True), dtype=torch.float32)
    layer = Layer(settings, Shape(1, 2, 48, 12), (2, 4, 6))
    module = layer.plain(F.scaled_dot_product_attention)
    assert layer.step(module).error() < 1e-5
    with torch.no_grad():
        module.attn["q_norm"].weight[0] *= 1.1
    assert layer.step(module).error() > 1e-4


def test_flex_attention_is_given_the_same_mask() -> None:
    mask = tile_windows((4, 4, 8), (2, 4, 2), (2, 4, 6))
    given = contestants.flex_mask(mask, "cpu")
    blocks = given.to_dense()[0, 0].bool()
    assert blocks.repeat_interleave(16, 0).repeat_interleave(16, 1).equal(mask.dense())
    assert given.full_kv_num_blocks.sum() == blocks.sum()  # none is looked at token by token
    assert given.kv_num_blocks.sum() == 0


@pytest.mark.parametrize("ends", [[0, 40, 64], [0, 16, 60]])
def test_flex_attention_is_given_no_ragged_mask(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="needs blocks of 16 tokens each"):
        contestants.flex_mask(packed(ends, block=(16, 16)), "cpu")


def test_who_cannot_serve_says_why() -> None:
    problem = Problem(TINY, "cpu", torch.float32)
    assert contestants.refusal(F.scaled_dot_product_attention, problem) == ""
    assert "No viable backend" in contestants.refusal(contestants.sdpa(SDPBackend.CUDNN_ATTENTION), problem)
    assert "backward on CPU" in contestants.refusal(contestants.flex("cpu"), problem)


@pytest.mark.parametrize("quick", [False, True])
def test_gpu_plans_cover_both_ways_of_every_size(quick: bool) -> None:
    settings = settings_for("cuda", quick)
    names = [plan.name for plan in dense_plans(settings)]
    assert len(names) == len(set(names)) == 2 * len(settings.heads) * len(settings.tokens)
    assert {"attention_dense_forward_d72_n4096", "attention_dense_backward_d128_n16384"} <= set(names)
    mask = tile_windows(*settings.windows)
    assert mask.density == 0.1
    contestants.flex_mask(mask, "cpu")  # its blocks are all full
    cpu = dataclasses.replace(settings, kind="cpu")
    assert len(list(window_plans(cpu))) == 2 * len(settings.window_head_dims)


def test_what_the_budget_does_not_reach_is_left_out_by_name(tmp_path: Path) -> None:
    sweep = run_plans(attention_plans("cpu", quick=True), "cpu", tmp_path / "a.json", budget_s=-1.0)
    assert sweep.results == ()
    assert "attention_dense_backward_d64_n48" in [one.case for one in sweep.left_out]
    assert all("were over" in one.reason for one in sweep.left_out)
    assert read_sweep(tmp_path / "a.json") == sweep
    assert not sound(sweep)


def test_the_norms_gate_notices_what_is_wrong() -> None:
    settings = dataclasses.replace(settings_for("cpu", quick=True), dtype=torch.float32)
    op = norm_rope.op(settings, Shape(1, 2, 48, 12), (2, 4, 6))
    definition = op.rivals.definition
    inputs = Inputs(definition, *op.draw())

    def unweighted(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> object:
        return definition(qkv, q_weight, k_weight * 1.01)

    for way in ("forward", "backward"):
        assert Step(inputs, definition, way).error() < 1e-5
        assert Step(inputs, unweighted, way).error() > 5e-3


def test_the_picture_is_drawn(result: Result, tmp_path: Path) -> None:
    rate = Measurement(50.0, 50.0, 50.0, "TFLOP/s", "higher", (50.0,))
    runs = {"SDPA flash": {"throughput": rate}, "dtrain": {"throughput": rate}}
    result = dataclasses.replace(result, case="attention_dense_forward_d64_n48", contestants=runs)
    plot(Sweep(1, (result,), (), 3.0), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_twice_in_memory() -> None:
    """A plan builds its inputs when its turn comes, and anew."""
    plan = next(iter(dense_plans(settings_for("cpu", quick=True))))
    (first, _), (second, _) = plan.make(), plan.make()
    setup = partial(lambda case: case.contestants["SDPA flash"]().problem)
    assert setup(first) is not setup(second)
