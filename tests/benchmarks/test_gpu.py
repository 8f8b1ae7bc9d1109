"""`make gpu`: its stages share their time, and all of them go through on the CPU at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Stage, run_stages, stages
from benchmarks.ladder.result import read_measured
from benchmarks.sweep.run import read_sweep
from benchmarks.sweep.table import sound
from dtrain.kernels.launch import HAS_TRITON
from dtrain.kernels.tiles import read_tables
from tests.launch import ROOT, run_python


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, whose wheels are for Linux")
def test_the_rehearsal_goes_all_the_way_on_few_packages(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path_factory.mktemp("missing")
    for name in ("pydantic", "av", "typer", "diffusers"):
        (missing / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name={name!r})")
    monkeypatch.setenv("PYTHONPATH", str(missing))
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path, "--budget-s", "1700"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "gpu.json").read_text())
    assert {o["name"]: o["exit_code"] for o in outcomes} == {
        "tests": 0,
        "attention": 0,
        "fused": 0,
        "overlap": 0,
        "scale": 0,
        "ladder": 0,
        "tune": 0,
    }
    assert " passed, 4 skipped in" in done.stdout  # CUDA graphs, memory of a GPU, twice four ranks

    sweep = read_sweep(tmp_path / "attention.json")
    assert len(sweep.results) == 7  # two passes dense, in windows and of the norms, and the layer
    for result in sweep.results:
        assert {"dtrain"} < result.contestants.keys()
        assert result.passed, result.gates
    assert {one.contestant for one in sweep.left_out} >= {"SDPA cuDNN", "FlexAttention"}

    sweep = read_sweep(tmp_path / "fused.json")
    assert len(sweep.results) == 33
    assert sound(sweep)
    assert {one.contestant for one in sweep.left_out if one.case.startswith("norm")} >= {"torch.compile"}

    tables = read_tables(str(tmp_path / "tiles.json"))
    assert set(tables.tiles["attention"]) == {"forward", "backward_dq", "backward_dkdv", "backward_fused"}
    assert [(c.head_dim, c.sparse) for c in tables.choices["sm_80"]] == [(64, False), (64, True)]
    assert {p.name for p in tmp_path.iterdir()} == {
        "gpu.json", "gpu.log", "attention.json", "attention.png", "fused.json", "fused.png",
        "tiles.json", "tune.json", "scale", "ladder",
    }  # fmt: skip
    ladder = read_measured(tmp_path / "ladder" / "ladder-measured.json")
    assert ladder.sound
    assert [(row.rung, len(row.steps_s)) for row in ladder.rows] == [("B1", 1), ("host", 1)]
    for row in ladder.rows:
        assert row.allocated_bytes == pytest.approx(row.planned_bytes, rel=0.1)
    log = (tmp_path / "gpu.log").read_text()
    assert all(words in log for words in ("Rehearsed", "rank 0 of 8", "Gates are green"))
    modelled = {"overlap.json", "scale.json", "plot.png"}
    assert {p.name for p in (tmp_path / "scale").iterdir()} == modelled


def test_a_stage_that_is_late_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    slow = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    chosen = [
        Stage("slow", ("-c", slow), 1),
        Stage("wrong", ("-c", "raise SystemExit(3)"), 1),
        Stage("after", ("-c", "print('planned {seconds}')"), 1),
    ]
    outcomes = run_stages(chosen, tmp_path, budget_s=6.0, rehearse=False)
    assert [(o.name, o.exit_code) for o in outcomes] == [("slow", -9), ("wrong", 3), ("after", 0)]
    assert 2.0 <= outcomes[0].seconds < 4.0
    time.sleep(max(0.0, 5.0 - sum(o.seconds for o in outcomes)))
    assert not (tmp_path / "late").exists()
    assert "planned 1" in (tmp_path / "gpu.log").read_text()


def test_time_that_is_left_goes_to_the_next_stages(tmp_path: Path) -> None:
    chosen = [Stage("quick", ("-c", ""), 99), Stage("long", ("-c", "print('{seconds} s')"), 1)]
    run_stages(chosen, tmp_path, budget_s=100.0, rehearse=False)
    planned = int((tmp_path / "gpu.log").read_text().split()[-2])
    assert 70 <= planned <= 80  # 0.85 · 100 - 5


def test_tests_that_need_a_missing_package_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError('none', name='av')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_PROBE", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{gpu._PROBE}")
    tests = next(iter(stages(tmp_path, rehearse=False)))
    assert "skipped: tests/uvit/test_gpu.py: needs the package av\n" in capsys.readouterr().out
    assert "tests/uvit/test_gpu.py" not in tests.arguments
    assert "tests/kernels/test_attention_gpu.py" in tests.arguments


def test_an_unknown_stage_is_refused() -> None:
    done = run_python("-m", "benchmarks.gpu", "--only", "paint", "--rehearse", check=False)
    assert done.returncode == 2
    assert (
        "--only = paint: must be one of tests, attention, fused, overlap, scale, ladder, tune" in done.stderr
    )


@pytest.mark.parametrize(("python", "installs"), [((), True), (("PYTHON=/opt/python3",), False)])
def test_make_gpu_installs_unless_it_is_told_which_python(python: tuple[str, ...], installs: bool) -> None:
    command = ["make", "--dry-run", "--always-make", "gpu", *python]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert ("pip install" in said) == installs
    assert f"{'.venv/bin/python' if installs else '/opt/python3'} -m benchmarks.gpu --out build/gpu" in said
