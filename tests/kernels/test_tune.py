"""The tuner: what it tries, throws out and writes. tests/benchmarks/test_gpu.py rehearses a whole run."""

import json
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch

from dtrain.kernels import tune_attention as op
from dtrain.kernels import tune_search
from dtrain.kernels.aot import Measurement
from dtrain.kernels.launch import HAS_TRITON, can_launch
from dtrain.kernels.tiles import Choice, Tile, choice, read_tables, tiles
from dtrain.kernels.tune import main
from dtrain.kernels.tune_search import Deadline, Findings, Tuner
from tests.launch import run_python

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or not can_launch(torch.device("cpu")),
    reason="needs TRITON_INTERPRET=1 in the environment, and no GPU",
)


@pytest.mark.parametrize("name", op.PASSES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_candidates_begin_with_the_shipped_tile_and_what_is_nearest(
    name: str, arch: str, head_dim: int
) -> None:
    found = op.candidates(name, arch, head_dim)
    shipped = tiles("attention", name, arch, head_dim)
    assert found[0] == shipped
    assert len(set(found)) == len(found) > 5
    distances = [op._distance(tile, shipped) for tile in found]
    assert distances == sorted(distances)
    assert distances[1] == 1
    assert any(tile.tma for tile in found) == (arch == "sm_90")
    assert {tile.num_stages for tile in found} >= {2, 3}


def test_candidates_fit_the_registers() -> None:
    # 128 rows of 64 sums and twice 128 · 128 scores, over the threads
    assert op._registers("forward", Tile(128, 128, 8, 2), 64) == (128 * 64 + 2 * 128 * 128) / 256
    # 128 keys own two sums each
    assert op._registers("backward_dkdv", Tile(64, 128, 8, 2), 64) == (128 * 64 * 2 + 2 * 64 * 128) / 256
    found = op.candidates("forward", "sm_90", 128)[1:]
    assert not any((t.block_m, t.block_n, t.num_warps) == (128, 128, 4) for t in found)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, whose wheels are for Linux")
def test_a_dry_run_compiles_for_a_gpu_that_is_not_there() -> None:
    done = run_python(
        "-m", "dtrain.kernels.tune", "--dry-run", "--arch", "sm_90",
        "--head-dim", "64", "--passes", "forward", "--limit", "2", "--workers", "1",
    )  # fmt: skip
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("forward         D=64  Tile(") for line in lines)
    assert lines[0].endswith(" registers")
    assert "are left on sm_90" in last


# What the compilers of a run leave behind is what its launches look for. `warmup` compiles as a launch does.
_FOUND = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from dtrain.kernels import tune_attention as op
from dtrain.kernels.aot import compile_case

class NoGPU:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(NoGPU())
dtypes = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "i32": 8, "fp32": 0.3}
for name in op.PASSES:
    case = op.aot_case(name, "sm_90", 72, op.candidates(name, "sm_90", 72)[0])
    names = case.kernel.arg_names
    arguments = [case.constexprs[n] if n in case.constexprs else dtypes[case.signature[n]] for n in names]
    ahead = compile_case(case)
    print(case.kernel.warmup(*arguments, grid=(1,), **case.options).hash == ahead.hash)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, whose wheels are for Linux")
def test_a_launch_finds_what_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run_python("-c", _FOUND).stdout.split() == ["True"] * len(op.PASSES)


def judged(*problems: str) -> "Future[Measurement]":
    future: Future[Measurement] = Future()
    future.set_result(Measurement("case", "sm_80", problems=problems))
    return future


FAST, WRONG, SPILLS = Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(128, 128, 4, 2)


def tuner(budget_s: float = 600.0) -> Tuner:
    return Tuner("cpu", tokens=24, limit=4, deadline=Deadline(budget_s))


@needs_interpreter
def test_tiles_that_spill_or_compute_wrongly_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = op.run

    def sometimes_wrong(problem: op.Problem, name: str, tile: Tile) -> dict[str, torch.Tensor]:
        made = run(problem, name, tile)
        return {**made, "dk": made["dk"] * torch.nan} if tile == WRONG else made

    monkeypatch.setattr(op, "run", sometimes_wrong)
    # The wrong one would be the fastest.
    monkeypatch.setattr(tune_search, "_milliseconds", lambda call, device, rep: call() and 1.0)
    one = tuner()
    one._tile("backward_dkdv", 64, [(SPILLS, judged("9 spill stores")), (WRONG, judged()), (FAST, judged())])
    assert one.found.tiles == {"backward_dkdv": {64: FAST}}
    reasons = {t.tile: t.problem for t in one.found.timings if t.problem}
    assert reasons == {SPILLS: "9 spill stores", WRONG: "dk is off by nan"}


@needs_interpreter
def test_the_fastest_wins_and_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Tile] = []
    monkeypatch.setattr(op, "run", lambda problem, name, tile: launched.append(tile) or {})
    times = iter([3.0, 1.0, 2.0, 1.5, 1.2, 9.0])  # then the two fastest and the third again
    monkeypatch.setattr(tune_search, "_milliseconds", lambda call, device, rep: call() == {} and next(times))
    one = tuner()
    one._tile("forward", 64, [(tile, judged()) for tile in (WRONG, FAST, SPILLS)])
    assert launched == [WRONG, WRONG, FAST, FAST, SPILLS, SPILLS, FAST, SPILLS, WRONG]
    assert one.found.tiles == {"forward": {64: SPILLS}}


def test_a_failing_candidate_is_named_and_the_shipped_tile_stays(caplog: pytest.LogCaptureFixture) -> None:
    broken: Future[Measurement] = Future()
    broken.set_exception(RuntimeError("no compiler"))
    one = tuner()
    one._tile("forward", 64, [(FAST, broken)])
    assert one.found.tiles == {}
    assert one.found.timings[0].problem == "RuntimeError: no compiler"
    assert "the shipped tile stays" in caplog.text


def test_the_quicker_of_ours_decides_against_pytorchs() -> None:
    one = tuner()
    one._choose(64, 2048, False, {"split": 3.0, "fused": 2.0}, {"flash": 1.0, "cudnn": 4.0})
    one._choose(64, 8192, False, {"split": 2.0, "fused": 3.0}, {"flash": 2.5})
    one._choose(64, 8192, True, {"split": 2.0}, {})
    one._choose(64, 9999, True, {}, {"flash": 1.0})  # ours does not run: nothing to choose
    assert one.found.choices == [
        Choice(64, 2048, False, "sdpa", "fused"),
        Choice(64, 8192, False, "triton", "split"),
        Choice(64, 8192, True, "triton", "split"),
    ]


def test_what_comes_after_the_deadline_is_left_out_by_name() -> None:
    one = tuner(budget_s=0.0)
    found = one.run([64], ["forward"], pool=_NoPool())
    assert found == Findings()
    assert one.deadline.left_out == ["tiles of forward, head dim 64", "choices of head dim 64"]


class _NoPool(Executor):
    def submit(self, function, /, *arguments, **options) -> "Future[Measurement]":
        return judged()


def test_the_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Findings({"forward": {64: FAST, 72: WRONG}}, [Choice(72, 2**31 - 1, False, "triton", "fused")])
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(found.as_file("sm_90")))
    assert read_tables(str(path)).choices["sm_90"] == tuple(found.choices)
    monkeypatch.setenv("DTRAIN_TILES", str(path))
    assert [tiles("attention", "forward", "sm_90", d) for d in (40, 64, 72)] == [FAST, FAST, WRONG]
    assert choice("sm_90", 64, 10**6, False) == found.choices[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--head-dim", "60"], "--head-dim = 60: must be one of 32, 40 … 128"),
        pytest.param(
            [],
            "--device = cuda: there is none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU"),
        ),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
