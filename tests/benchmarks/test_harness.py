"""The harness on a real, tiny case: a matrix product against the same sum of outer products."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.case import Case, Cost, Counted, Gate, Timed
from benchmarks.harness import run
from benchmarks.memory import peak_bytes
from benchmarks.record import write_record
from benchmarks.result import read
from benchmarks.stats import estimate

N = 32


class Product:
    def __init__(self, how: str, offset: float = 0.0) -> None:
        self.how, self.offset, self.calls = how, offset, 0
        self.a, self.b = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0)).double()

    def value(self) -> Tensor:
        if self.how == "matmul":
            return self.a @ self.b + self.offset
        return torch.stack([torch.outer(self.a[:, i], self.b[i]) for i in range(N)]).sum(0)

    def __call__(self) -> None:
        self.calls += 1
        self.value()


def error(work: Product, reference: Product) -> float:
    return float((work.value() - reference.value()).norm() / reference.value().norm())


def case(**changes: object) -> Case:
    toy = Case(
        name="toy",
        title="a product",
        baseline="outer",
        contestants={"outer": lambda: Product("outer"), "matmul": lambda: Product("matmul")},
        gates=(Gate("value", 1e-12, error),),
        metrics=(
            Timed("call_ms"),
            Timed("rate", "GFLOP/s", "higher", lambda s: 2 * N**3 / s / 1e9),
            Counted("peak_bytes", "bytes", peak_bytes),
        ),
        cost=Cost(2 * N**3, 3 * N * N * 8, "one product", "float64"),
        rounds=7,
        warmup=1,
    )
    return replace(toy, **changes)


@pytest.fixture(scope="module")
def result():
    return run(case())


def test_a_round_is_one_call_of_each_and_ratios_are_paired(result):
    assert result.rounds == 7
    outer, matmul = result.contestants["outer"], result.contestants["matmul"]
    assert len(outer["call_ms"].samples) == len(matmul["call_ms"].samples) == 7
    paired = [b / o for b, o in zip(outer["call_ms"].samples, matmul["call_ms"].samples, strict=True)]
    ratio = {r.metric: r for r in result.ratios}["call_ms"]
    assert (ratio.low, ratio.value, ratio.high) == estimate(paired)


def test_more_is_better_turns_the_ratio_round(result):
    ratios = {r.metric: r.value for r in result.ratios}
    assert ratios["rate"] == pytest.approx(ratios["call_ms"], rel=1e-9)


def test_counted_bytes_and_their_ratio_are_exact(result):
    # outer: N matrices live while they are stacked into a copy of all
    outer = result.contestants["outer"]["peak_bytes"]
    assert outer.samples == (2 * N * N * N * 8,)
    matmul = result.contestants["matmul"]["peak_bytes"]
    assert {r.metric: r.value for r in result.ratios}["peak_bytes"] == outer.value / matmul.value


def test_cpu_share_is_a_share(result):
    assert 0 < result.cpu_share < 1.1  # the two clocks are read one after the other


def test_floor_is_the_larger_of_two_times(result):
    floor = result.floor
    assert (floor.flops, floor.bytes) == (2 * N**3, 3 * N * N * 8)
    assert floor.floor_ms == 1e3 * max(floor.flops / floor.flops_per_s, floor.bytes / floor.bytes_per_s)


@pytest.mark.parametrize("offset", [1e-6, float("nan")])
def test_no_ratio_behind_a_red_gate(offset):
    setups = {
        "outer": lambda: Product("outer"),
        "wrong": lambda: Product("matmul", offset),
        "right": case().contestants["matmul"],
    }
    got = run(case(contestants=setups), rounds=1)
    assert not got.passed
    assert {g.contestant: g.passed for g in got.gates} == {"wrong": False, "right": True}
    assert {r.contestant for r in got.ratios} == {"right"}
    assert set(got.contestants) == set(setups)


def test_every_contestant_is_called_once_a_round():
    made: list[Product] = []

    def setup() -> Product:
        made.append(Product("matmul"))
        return made[-1]

    run(
        case(baseline="a", contestants={"a": setup, "b": setup}, metrics=(Timed("call_ms"),), warmup=3),
        rounds=4,
    )
    assert [product.calls for product in made] == [7, 7]


def test_a_result_survives_its_file(result, tmp_path):
    write_record(result, tmp_path / "toy.json")
    assert read(tmp_path / "toy.json") == result


def test_a_case_names_its_baseline():
    with pytest.raises(ValueError, match="baseline = 'none'"):
        case(baseline="none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_case_without_its_device_is_refused():
    with pytest.raises(ValueError, match="toy: needs a cuda device"):
        run(case(device="cuda"))


def test_rates_may_come_from_before() -> None:
    floor = run(case(rounds=1), rates=(2.0 * N**3, 1.0)).floor
    assert (floor.flops_per_s, floor.bytes_per_s) == (2.0 * N**3, 1.0)
    assert floor.floor_ms == 3 * N * N * 8 * 1e3  # bytes bind


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert environment.git_state() == (None, None)
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert environment.git_state() == ("abc", None)
