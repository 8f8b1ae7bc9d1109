"""Sweeps: what fails is left out by name, and how a table reads."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.case import Case
from benchmarks.result import GateResult, Measurement, Result
from benchmarks.sweep.plan import LeftOut, Plan
from benchmarks.sweep.run import Sweep, read_sweep, run_plans
from benchmarks.sweep.table import sound, table


def test_a_case_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    def fail() -> tuple[Case, list[LeftOut]]:
        raise RuntimeError("out of memory\nlong story")

    plan = Plan("attention_dense_forward_d64_n48", 0, fail)
    sweep = run_plans([plan, plan], "cpu", tmp_path / "a.json")
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
    first, *rest = table(swept(result)).splitlines()
    # 10¹² FLOPs in 2 ms, of 2·10¹² a second
    words = "attention_dense_forward_d64_n48 2.000 ms 500.0 TFLOP/s 25000% | SDPA flash ×2.00 | late red"
    assert " ".join(first.split()) == words
    assert rest == ["left out: a SDPA cuDNN: no", "left out: b : over", "1 cases in 3 s"]


def test_work_without_flops_is_held_against_a_copy(result: Result) -> None:
    floor = dataclasses.replace(result.floor, flops=0)
    first = table(swept(result, floor=floor)).splitlines()[0]
    # 10⁹ bytes in 2 ms, of 10¹⁰ a second
    assert "2.000 ms 0.50 TB/s 5000% |" in " ".join(first.split())


def test_peak_memory_stands_where_it_was_measured(result: Result) -> None:
    runs = dict(swept(result).results[0].contestants)
    for name, gib in (("dtrain", 2.0), ("SDPA flash", 3.0)):
        peak = Measurement(gib * 2**30, gib * 2**30, gib * 2**30, "bytes", "lower", (gib * 2**30,))
        runs[name] = {**runs[name], "peak_bytes": peak}
    first = " ".join(table(swept(result, contestants=runs)).splitlines()[0].split())
    assert "25000% 2.00 GiB | SDPA flash ×2.00, memory ×1.50 |" in first


def test_only_our_own_red_gates_make_a_sweep_unsound(result: Result) -> None:
    good = swept(result)
    assert sound(good)
    red = tuple(dataclasses.replace(g, passed=False) for g in good.results[0].gates)
    assert not sound(swept(result, gates=red))
    assert "RED" in table(swept(result, gates=red))
    theirs = {"SDPA flash": good.results[0].contestants["SDPA flash"]}
    assert not sound(swept(result, contestants=theirs))
    assert "dtrain did not run" in table(swept(result, contestants=theirs))
