"""The sweep of attention: its truth, its gates, its budget, its file and its table."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention import contestants, exact, norm_rope, suite, table
from benchmarks.attention.exact import exact_attention
from benchmarks.attention.layer import Layer, LayerStep
from benchmarks.attention.operation import dense_plans, window_plans
from benchmarks.attention.plan import LeftOut, settings_for
from benchmarks.attention.problem import Backward, Forward, Problem, Shape, error_ratio
from benchmarks.attention.suite import Sweep, read_sweep, run_sweep
from benchmarks.result import GateResult, Measurement, Result
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
    assert LayerStep(layer, module, torch.float32).error() < 1e-5
    with torch.no_grad():
        module.attn["q_norm"].weight[0] *= 1.1
    assert LayerStep(layer, module, torch.float32).error() > 1e-4


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
    sweep = run_sweep("cpu", tmp_path / "a.json", quick=True, budget_s=-1.0)
    assert sweep.results == ()
    assert "attention_dense_backward_d64_n48" in [one.case for one in sweep.left_out]
    assert all("were over" in one.reason for one in sweep.left_out)
    assert read_sweep(tmp_path / "a.json") == sweep
    assert not table.sound(sweep)


def test_a_case_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> Result:
        raise RuntimeError("out of memory\nlong story")

    monkeypatch.setattr(suite, "measure", fail)
    monkeypatch.setattr(suite, "_plans", lambda settings: [next(iter(dense_plans(settings)))] * 2)
    sweep = run_sweep("cpu", tmp_path / "a.json", quick=True)
    failed = LeftOut("attention_dense_forward_d64_n48", "", "RuntimeError: out of memory")
    assert sweep.left_out == (failed, failed)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(ValueError, match=r"a\.json: \$\."):
        read_sweep(tmp_path / "a.json")


def swept(result: Result, **changes: object) -> Sweep:
    def metrics(*ms: float) -> dict[str, Measurement]:
        rate = tuple(100 / x for x in ms)
        return {
            "call_ms": Measurement(ms[1], min(ms), max(ms), "ms", "lower", ms),
            "throughput": Measurement(rate[1], min(rate), max(rate), "TFLOP/s", "higher", rate),
        }

    runs = {
        "SDPA flash": metrics(4.0, 4.0, 6.0),
        "dtrain": metrics(2.0, 2.0, 2.0),
        "late": metrics(9.0, 9.0, 9.0),
    }
    gates = tuple(GateResult("error", name, name != "late", 1.0, 2.0) for name in runs)
    swept = dataclasses.replace(
        result, case="attention_dense_forward_d64_n48", contestants=runs, gates=gates, baseline="SDPA flash"
    )
    left_out = (LeftOut("a", "SDPA cuDNN", "no"), LeftOut("b", "SDPA cuDNN", "no"), LeftOut("b", "", "over"))
    return Sweep(1, (dataclasses.replace(swept, **changes),), left_out, 3.0)


def test_the_table_has_a_line_a_case(result: Result) -> None:
    first, *rest = table.table(swept(result)).splitlines()
    # 10¹² FLOPs in 2 ms, of 2·10¹² a second
    words = "attention_dense_forward_d64_n48 2.000 ms 500.0 TFLOP/s 25000% | SDPA flash ×2.00 | late red"
    assert " ".join(first.split()) == words
    assert rest == ["left out: a SDPA cuDNN: no", "left out: b : over", "1 cases in 3 s"]


def test_work_without_flops_is_held_against_a_copy(result: Result) -> None:
    floor = dataclasses.replace(result.floor, flops=0)
    first = table.table(swept(result, floor=floor)).splitlines()[0]
    # 10⁹ bytes in 2 ms, of 10¹⁰ a second
    assert "2.000 ms 0.50 TB/s 5000% |" in " ".join(first.split())


def test_the_norms_gate_notices_what_is_wrong() -> None:
    settings = dataclasses.replace(settings_for("cpu", quick=True), dtype=torch.float32)
    inputs = norm_rope.Inputs(settings, Shape(1, 2, 48, 12), (2, 4, 6))

    def unweighted(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> object:
        return norm_rope.plain(qkv, q_weight, k_weight * 1.01, cos, sin)

    for way in ("forward", "backward"):
        assert norm_rope.Step(inputs, norm_rope.plain, way).error() < 1e-5
        assert norm_rope.Step(inputs, unweighted, way).error() > 5e-3


def test_only_our_own_red_gates_make_a_sweep_unsound(result: Result) -> None:
    good = swept(result)
    assert table.sound(good)
    red = tuple(dataclasses.replace(g, passed=False) for g in good.results[0].gates)
    assert not table.sound(swept(result, gates=red))
    assert "RED" in table.table(swept(result, gates=red))
    theirs = {"SDPA flash": good.results[0].contestants["SDPA flash"]}
    assert not table.sound(swept(result, contestants=theirs))
    assert "dtrain did not run" in table.table(swept(result, contestants=theirs))


def test_the_picture_is_drawn(result: Result, tmp_path: Path) -> None:
    table.plot(swept(result), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_timed_twice_in_memory() -> None:
    """A plan builds its inputs when its turn comes, and anew."""
    plan = next(iter(dense_plans(settings_for("cpu", quick=True))))
    (first, _), (second, _) = plan.make(), plan.make()
    setup = partial(lambda case: case.contestants["SDPA flash"]().problem)
    assert setup(first) is not setup(second)
