"""The measured ladder: its gate, its rungs on the CPU, and what is said of a rung that cannot be measured."""

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import plain_dit
from benchmarks.baselines.plain_dit import PlainDiT
from benchmarks.environment import origin
from benchmarks.ladder import worker
from benchmarks.ladder.__main__ import main
from benchmarks.ladder.gate import check
from benchmarks.ladder.measured import Wanted, _parts, _with
from benchmarks.ladder.planned import plan_peak
from benchmarks.ladder.result import MeasuredLadder
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.table import measured_table
from benchmarks.ladder.training import start
from benchmarks.ladder.worker import Answer, Workers
from benchmarks.ladder.workloads import WORKLOADS, tiny
from benchmarks.memory import peak_bytes
from benchmarks.record import Device, write_record
from dtrain.plan.fake import alone
from dtrain.swap.attention import swap_attention
from dtrain.swap.fusion import swap_fused

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["h2", "xl2", "2b-33k"])
def test_rungs_that_do_not_round_train_one_function(name: str) -> None:
    """Loss and all gradients, of images, of a DiT whose layers are swapped, and of clips."""
    gates = check(tiny(WORKLOADS[name]), list(RUNGS), CPU, "float32")
    assert {g.rung for g in gates} == {name for name, rung in RUNGS.items() if not rung.rounds}
    for one in gates:
        assert one.passed, one
        assert one.limit == 1e-5


def test_gate_in_bf16_sees_a_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = {g.rung: g for g in check(tiny(WORKLOADS["xl2"]), ["none"], CPU)}
    assert gates["B1"].passed, gates
    assert gates["none"].passed, gates

    def halved(model: nn.Module, *_: Any) -> None:
        for block in (m for m in model.modules() if isinstance(m, plain_dit.Attention)):
            block.register_forward_hook(lambda _m, _i, out: 0.5 * out)

    monkeypatch.setattr("dtrain.parallelize.swap_attention", halved)
    gates = {g.rung: g for g in check(tiny(WORKLOADS["xl2"]), ["none"], CPU)}
    assert gates["B1"].passed
    assert not gates["none"].passed


def test_every_layer_of_a_dit_is_swapped() -> None:
    with torch.device("meta"):
        model = PlainDiT(8, 2, 4, 128, 2, 2, 5)
    attention, fused = swap_attention(model), swap_fused(model)
    assert not attention.left
    assert not fused.left
    assert list(attention.swapped) == ["blocks.0.attn", "blocks.1.attn"]
    inside = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("norm1", "norm2", "mlp")]
    assert sorted(fused.swapped) == sorted([*inside, "norm"])


@pytest.mark.parametrize("rung", ["B1", "B4", "chunks", "host-bf16"])
def test_a_rung_holds_what_is_planned_and_stays_finite(rung: str) -> None:
    """Rank 0 of eight; a CPU's attention takes some memory inside, of which the plan knows nothing."""
    workload = tiny(WORKLOADS["h2"])
    chosen = replace(RUNGS[rung], activations=replace(RUNGS[rung].activations, stash_smallest=1))
    planned = plan_peak(workload, chosen, 8, "").nbytes
    with alone(8):
        training = start(workload, chosen, 8, CPU)
        for _ in range(2):
            training.step()
        held = training.held_bytes + peak_bytes(training.gradients)
        assert all(p.isfinite().all() for p in map(_local, training.model.parameters()))
    # Buffers of the host's memory are there since the first step.
    assert 1 <= held / planned < 1.05


def _local(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, "_local_tensor", parameter)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["--measure", "--out", str(tmp_path)]) == 2
    assert "--measure: there is no CUDA device" in capsys.readouterr().err


class _Answers(Workers):
    """What processes on a GPU would have answered."""

    def __init__(self, red: bool) -> None:
        self.red = red

    def ask(self, task: str, **arguments: Any) -> Answer:
        one = {"workload": "xl2", "rung": "B1", "loss_error": 0.0, "gradient_error": 0.1, "limit": 0.05}
        answers: dict[str, Answer] = {
            "gate": {"gates": [one | {"passed": not self.red}]},
            "B1": {"oom": "asked for 2.00 GiB beside 138.1 GiB"},
            "B2": {"allocated_bytes": 4 * 2**20, "reserved_bytes": 6 * 2**20, "steps_s": [3.0, 1.0, 2.0]},
            "B4": {"failed": "its process ended with exit code -9"},
        }
        return answers[arguments["rung"] if task == "measure" else task]


def ladder_of(red: bool, seconds: float) -> MeasuredLadder:
    """Three rungs of a workload, with a budget of so many seconds."""
    wanted = Wanted(["xl2"], [2], ["B1", "B2", "B4"], rehearse=False, budget_s=seconds, jobs=1)
    plans: dict[Any, Future[tuple[int, int]]] = {one: Future() for one in wanted.all}
    for plan in plans.values():
        plan.set_result((5 * 2**20, 0))
    device = Device("cuda", "A GPU", 1, 2**30)
    whole = MeasuredLadder(
        kind="measured", schema_version=1, device=device, rows=(), gates=(), missing=(), **origin("x", [])
    )
    for part in _parts(wanted, _Answers(red), plans, time.perf_counter() + seconds):
        whole = _with(whole, part)
    return whole


@pytest.mark.parametrize("red", [False, True])
def test_out_of_memory_is_a_row_and_a_red_gate_has_no_times(red: bool, tmp_path: Path) -> None:
    ladder = ladder_of(red, seconds=100)
    assert [row.rung for row in ladder.rows] == ["B1", "B2"]
    assert ladder.rows[0].allocated_bytes is None
    assert ladder.rows[1].step_s == (None if red else 2.0)
    assert [(one.rung, one.failed) for one in ladder.missing] == [("B4", True)]
    assert not ladder.sound
    text = measured_table(ladder)
    assert "B1: out of memory, asked for 2.00 GiB beside 138.1 GiB" in text
    assert "FAILED: xl2 B4 on 2: its process ended with exit code -9" in text
    assert "1.250" in text  # planned / allocated
    assert ("RED GATE, no times: xl2 B1" in text) == red
    assert ("2.000 s" in text) == (not red)
    write_record(ladder, tmp_path / "ladder-measured.json")
    assert main(["--measure", "--show", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "ladder-measured.png").stat().st_size > 10_000


def test_what_has_no_time_is_left_out_by_name() -> None:
    ladder = ladder_of(red=False, seconds=0)
    assert not ladder.rows
    assert ladder.sound
    assert "left out: xl2 B1 on 2: the 0 s of the run would not do" in measured_table(ladder)


def test_a_worker_tells_memory_from_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"workload": "xl2", "rung": "B1", "world": 2, "kind": "cpu", "small": True}

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total …")

    monkeypatch.setattr(worker, "start", full)
    assert worker.measure(**arguments) == {"oom": "asked for 2.50 GiB beside 0.0 GiB"}

    def wrong(*_: Any) -> None:
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(worker, "start", wrong)
    with pytest.raises(RuntimeError, match="misaligned"):
        worker.measure(**arguments)
