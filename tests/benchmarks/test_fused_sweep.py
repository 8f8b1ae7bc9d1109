"""The sweep of the fused ops: what it counts, its gates, who is left out, its picture.

That all of it goes through at tiny sizes, `test_gpu.py` shows.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import plain_quantize, plain_uvit
from benchmarks.case import Case
from benchmarks.fused import adamw, block, kernels
from benchmarks.fused.adamw import Averaging, Shards, Update
from benchmarks.fused.liger import with_liger
from benchmarks.fused.mlp import gelu_routines, mlp_op, skip_op
from benchmarks.fused.norms import norm_ops
from benchmarks.fused.plans import fused_plans
from benchmarks.fused.plot import plot, share
from benchmarks.fused.quantize import quantize_routines
from benchmarks.fused.settings import settings_for
from benchmarks.fused.train_step import Training, TrainStep
from benchmarks.harness import check_gates
from benchmarks.result import Measurement, Result
from benchmarks.sweep.call import Routine, call_plans
from benchmarks.sweep.op import Op, op_plans
from benchmarks.sweep.plan import LeftOut
from benchmarks.sweep.run import Sweep
from dtrain.kernels import quantize_reference
from dtrain.kernels.payload import Format, payload_bytes

FULL = dataclasses.replace(settings_for("cpu", quick=False), dtype=torch.float32)
OPS = [*norm_ops(FULL), mlp_op(FULL, FULL.images), skip_op(FULL, FULL.images)]
ROUTINES = [*gelu_routines(FULL, FULL.images), *quantize_routines(FULL)]


def name_of(work: Op | Routine) -> str:
    return "_".join(work.name) if isinstance(work, Op) else work.name


def nbytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def outputs(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("quick", [False, True])
def test_a_gpu_measures_the_sizes_of_models(quick: bool) -> None:
    names = [plan.name for plan in fused_plans("cuda", quick)]
    assert len(names) == len(set(names)) == (33 if quick else 51)
    assert {"norm_backward_layer_d1152", "norm_backward_rms_d2048", "mlp_backward_d1152"} <= set(names)
    assert {"block_skip_d1152", "block_d2048", "adamw_ema", "train_step_b128"} <= set(names)
    shards = Shards(dataclasses.replace(settings_for("cuda", quick), dtype=torch.float32), averaged=True)
    assert shards.numel == pytest.approx(500.8e6 / 8, rel=0.01)
    assert shards.cost("fp32").bytes == 36 * shards.numel
    assert shards.cost("8bit").bytes == pytest.approx(24.07 * shards.numel, rel=0.001)


@pytest.mark.parametrize("op", [*norm_ops(FULL)], ids=name_of)
def test_bytes_of_a_norm_are_those_of_its_tensors(op: Op) -> None:
    leaves, grads = op.draw()
    results = outputs(op.rivals.definition, leaves)
    rows = grads[0].numel() // grads[0].shape[-1]
    statistics = rows * (4 if "rms" in op.name[1] else 8)
    assert op.cost["forward"].bytes == nbytes(*leaves, *results) + statistics
    # Backwards x or the sum, and the gradients; with a gate the branch, and its gradient.
    tensors = 6 if "adaln" in op.name[1] else 2 + len(grads)
    vectors = op.cost["backward"].bytes - tensors * grads[0].nbytes - statistics
    assert 0 <= vectors <= 3 * nbytes(*leaves[len(grads) :])


@pytest.mark.parametrize("routine", ROUTINES, ids=name_of)
def test_bytes_of_a_call_are_those_of_its_tensors(routine: Routine) -> None:
    inputs = routine.draw()
    # What is overwritten is among the results, or ours has its result there.
    results = outputs(routine.rivals.definition, inputs)
    assert routine.cost.bytes == nbytes(*inputs, *results)


@pytest.mark.parametrize("op", [mlp_op(FULL, FULL.images), skip_op(FULL, FULL.images)], ids=name_of)
def test_flops_are_those_that_are_counted(op: Op) -> None:
    leaves, grads = op.draw()
    leaves = [x.requires_grad_() for x in leaves]
    for way in ("forward", "backward"):
        with FlopCounterMode(display=False) as counter:
            if way == "forward":
                out = op.rivals.definition(*leaves)
            else:
                torch.autograd.grad(out, leaves, list(grads))
        assert counter.get_total_flops() == op.cost[way].flops


@pytest.mark.parametrize("skip", [False, True])
def test_flops_of_a_block_are_those_that_are_counted(skip: bool) -> None:
    size = FULL.images
    problem = block.BlockProblem(FULL, size, skip)
    module = problem.module(plain_uvit.Block, F.scaled_dot_product_attention)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*problem.inputs.values())
    attention = 4 * size.tokens * size.rows * size.width
    plan = next(p for p in block.block_plans(FULL) if p.name == f"block_{'skip_' if skip else ''}d64")
    assert plan.flops == 3 * (counter.get_total_flops() - attention) + attention * 7 // 2


@pytest.mark.parametrize("work", [*OPS, *ROUTINES], ids=name_of)
def test_a_definition_is_compiled_whole(work: Op | Routine) -> None:
    """A break in the graph would slow down a contestant that only a GPU has."""
    definition = work.rivals.definition
    inputs = work.draw()[0] if isinstance(work, Op) else work.draw()
    graph = torch.compile(definition, dynamic=False, fullgraph=True, backend="eager")
    pairs = (outputs(f, [x.clone() for x in inputs]) for f in (graph, definition))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want)


def made(work: Op | Routine, ours: Callable[..., Any]) -> tuple[Case, list[LeftOut]]:
    """The last of its cases, with another function for ours."""
    work = dataclasses.replace(work, rivals=dataclasses.replace(work.rivals, ours=ours))
    plans = op_plans(FULL, work) if isinstance(work, Op) else call_plans(FULL, work)
    return list(plans)[-1].make()


def passes(case: Case) -> bool:
    gates = check_gates(case, {name: setup() for name, setup in case.contestants.items()})
    assert {gate.contestant for gate in gates} == {"dtrain"}
    return all(gate.passed for gate in gates)


def shifted(function: Callable[..., Any], which: int) -> Callable[..., Any]:
    """The same, with one of its results wrong by a little."""

    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = outputs(function, inputs)
        x = results[which]
        results[which] = x ^ 1 if x.dtype == torch.uint8 else x * 1.001
        return tuple(results)

    return wrong


@pytest.mark.parametrize("work", [*OPS, *ROUTINES], ids=name_of)
def test_gates_notice_any_wrong_result(work: Op | Routine) -> None:
    definition = work.rivals.definition
    assert passes(made(work, definition)[0])
    inputs = work.draw()[0] if isinstance(work, Op) else work.draw()
    for which in range(len(outputs(definition, [x.clone() for x in inputs]))):
        assert not passes(made(work, shifted(definition, which))[0])


@pytest.mark.parametrize("format", [Format("int8"), Format("fp8", 64), Format("int4", 32, 32)], ids=str)
def test_the_plain_payload_is_that_of_the_reference(format: Format) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:128] = 0
    residual = [torch.zeros(1024 if format.rotation else 1000) for _ in range(2)]
    for seed in (None, 5):
        if format.bits == "fp8" and seed is not None:
            continue
        payload = torch.empty(payload_bytes(1000, format), dtype=torch.uint8)
        quantize_reference.encode(x[None], payload[None], None, residual[0][None], format, seed, 0)
        assert plain_quantize.encode(x, format, residual[1], seed).equal(payload)
        torch.testing.assert_close(residual[1], residual[0])
    decoded = torch.empty(1000)
    quantize_reference.decode_sum(payload[None, None], decoded[None], 1, format)
    torch.testing.assert_close(plain_quantize.decode(payload, 1000, format), decoded)


def test_an_update_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(FULL, averaged=True)
    base = Update(shards, partial(Averaging, fused=True))
    assert adamw._TWICE.error(Update(shards, partial(Averaging, foreach=True)), base) < 1.1
    for name, value in (("_WEIGHT_DECAY", 0.031), ("_EMA_WEIGHT", 0.01001)):
        with monkeypatch.context() as patch:
            patch.setattr(adamw, name, value)
            assert adamw._TWICE.error(Update(shards, Averaging), base) > 2


def test_ours_may_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_launch", lambda device: True)
    problem = block.BlockProblem(FULL, FULL.images, skip=True)
    module = problem.module(block.Block, F.scaled_dot_product_attention)
    assert [x.fused_backend for x in (module.norm1, module.norm2, module.mlp)] == ["triton"] * 3
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        problem.step(module)()


def test_a_block_that_is_wrong_is_noticed() -> None:
    problem = block.BlockProblem(FULL, FULL.images, skip=True)
    module = problem.module(block.Block, F.scaled_dot_product_attention)
    assert problem.step(module).error() < 1e-5
    with torch.no_grad():
        module.norm2.weight[0] *= 1.1
    assert problem.step(module).error() > 1e-4


def test_a_training_step_that_is_wrong_is_noticed() -> None:
    training = Training(FULL, F.scaled_dot_product_attention)
    base = TrainStep(training, training.plain, training.fused_adamw())
    ours = TrainStep(training, training.ours, training.our_adamw())
    assert max(base.error(), ours.error()) < 1e-4
    ours.model.mid_block.norm1.eps = 0.1
    assert ours.error() > 1e-3


def test_a_step_updates_what_all_contestants_share() -> None:
    training = Training(FULL, F.scaled_dot_product_attention)
    works = [
        TrainStep(training, training.plain, training.fused_adamw()),
        TrainStep(training, training.ours, training.our_adamw()),
    ]
    for work in works:
        before = [x["patch_embed.proj.weight"].clone() for x in (training.parameters, training.averages)]
        work()
        after = [x["patch_embed.proj.weight"] for x in (training.parameters, training.averages)]
        assert not any(x.equal(y) for x, y in zip(before, after, strict=True))
        assert max(work.error() for work in works) < 1e-4  # of the new parameters, each


def test_who_is_not_installed_is_left_out_by_name() -> None:
    for plan in fused_plans("cpu", quick=True):
        if plan.name == "norm_forward_layer_d64":
            _, missing = plan.make()
            reasons = {one.contestant: one.reason for one in missing}
            assert reasons["torch.compile"] == "not rehearsed on the CPU"
            assert "TRITON_INTERPRET=1" in reasons["dtrain"]
            if "liger_kernel" not in sys.modules:
                assert reasons["Liger-Kernel"].startswith("ModuleNotFoundError")


def test_liger_is_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    rivals = with_liger(F.silu, F.silu, F.gelu)
    assert rivals.others == {"Liger-Kernel": F.gelu}
    assert not rivals.absent


def test_ours_is_left_out_where_it_fails() -> None:
    def fail(*inputs: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nlong story")

    case, missing = made(OPS[0], fail)
    assert list(case.contestants) == ["eager"]
    assert "RuntimeError: no such kernel" in [one.reason for one in missing]


def test_the_picture_is_drawn(result: Result, tmp_path: Path) -> None:
    ms = Measurement(2.0, 2.0, 2.0, "ms", "lower", (2.0,))
    result = dataclasses.replace(result, contestants={"eager": {"call_ms": ms}, "dtrain": {"call_ms": ms}})
    copied = dataclasses.replace(result, floor=dataclasses.replace(result.floor, flops=0))
    assert share(result, "dtrain") == pytest.approx(250)  # 10¹² FLOPs in 2 ms, of 2·10¹² a second
    assert share(copied, "dtrain") == pytest.approx(50)  # 10⁹ bytes in 2 ms, of 10¹⁰ a second
    plot(Sweep(1, (result, copied), (), 3.0), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
