"""The link benchmark without a network: rates, fits, what follows from ranks' records, table, picture."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.link.__main__ import main
from benchmarks.link.fit import Fit, break_even, fit_line, with_break_evens
from benchmarks.link.neighbours import Neighbours, watch_neighbours
from benchmarks.link.rate import parse_rate, rate_name
from benchmarks.link.records import RankRecord, Record
from benchmarks.link.result import LinkRun, RateResult, rate_result, read_run, step_times
from benchmarks.link.table import table
from benchmarks.link.workload import BASELINES, Workload, check_variants
from benchmarks.record import write_record
from tests.benchmarks.origin import ORIGIN

PARAMETERS = 1000
QUIET = Neighbours(0.03, 0.0)


def test_rates_are_read_as_tc_writes_them() -> None:
    assert [parse_rate(text) for text in ("200mbit", "0.2gbit", "1GBIT")] == [2e8, 2e8, 1e9]
    assert parse_rate("unlimited") is None
    assert [rate_name(rate) for rate in (2e8, 5e9, None)] == ["0.2 Gbit/s", "5 Gbit/s", "unlimited"]
    for wrong in ("1", "1gb", "-1gbit", "0gbit", "fast", "1000gbit"):
        with pytest.raises(ValueError, match=r"rate = .*such as 0\.2gbit"):
            parse_rate(wrong)


def test_variants_need_a_baseline() -> None:
    check_variants(("int8", "bf16"))
    with pytest.raises(ValueError, match="variants = 'int7'"):
        check_variants(("bf16", "int7"))
    with pytest.raises(ValueError, match="add one of the baselines, fsdp2-bf16 or bf16"):
        check_variants(("int8", "auto"))


def line(size: float, rest: float) -> dict[float | None, float]:
    return {rate: 8 * size / rate + rest for rate in (2e8, 1e9, 5e9)} | {None: rest}


def test_a_fit_finds_the_line_and_says_how_far_off_it_is() -> None:
    fit = fit_line(line(4e8, 1.5))
    assert fit is not None
    assert fit.bytes == pytest.approx(4e8)
    assert fit.rest_s == pytest.approx(1.5)
    assert fit.worst_error < 1e-9
    assert fit.seconds(1e9) == pytest.approx(4.7)
    assert fit.seconds(None) == pytest.approx(1.5)
    bent = fit_line(line(4e8, 1.5) | {1e9: 3.0})
    assert bent is not None
    assert bent.worst_error > 0.1
    assert fit_line({1e9: 1.0}) is None


def test_a_break_even_is_where_lines_cross() -> None:
    plain, small = Fit(4e8, 1.0, 0.0), Fit(1e8, 1.6, 0.0)
    rate = break_even(small, plain)
    assert rate == pytest.approx(4e9)
    assert small.seconds(rate) == pytest.approx(plain.seconds(rate))
    assert small.seconds(rate / 2) < plain.seconds(rate / 2)
    assert break_even(Fit(1e8, 0.9, 0.0), plain) == math.inf
    assert break_even(Fit(4e8, 1.1, 0.0), plain) == 0


def test_a_break_even_is_against_the_best_of_the_baselines() -> None:
    fits = {"fsdp2-bf16": Fit(5e8, 1.0, 0.0), "bf16": Fit(4e8, 1.2, 0.0), "int8": Fit(2e8, 1.5, 0.0)}
    found = with_break_evens(fits, BASELINES)
    assert found["bf16"].break_even_bits_per_s is None
    # Of the two crossings, 4.8 and 5.33 Gbit/s, the lower: above it one baseline is faster.
    assert found["int8"].break_even_bits_per_s == pytest.approx(4.8e9)
    always = with_break_evens(fits | {"int8": Fit(2e8, 0.9, 0.0)}, BASELINES)
    assert always["int8"].break_even_bits_per_s is None


def record(*step_s: float, sent: int, meter: float | None = None, preset: str = "none") -> Record:
    count = len(step_s)
    return Record(
        preset=preset,
        step_s=step_s,
        cpu_s=(0.5,) * count,
        sent_bytes=(sent,) * count,
        meter_bytes=() if meter is None else (meter,) * count,
        page_faults=(7,) * count,
        losses=tuple(1.0 / (i + 1) for i in range(count)),
    )


def ranks(slower: float = 1.0) -> list[RankRecord]:
    """Two hosts; `slower` is how many times longer the second takes for int8."""
    return [
        RankRecord(
            PARAMETERS,
            {
                "fsdp2-bf16": record(4.0, 6.0, 4.4, sent=4000),
                "bf16": record(5.0, 5.0, 5.0, sent=3000, meter=2990.0, preset="bf16"),
                "int8": record(2.0 * k, 2.0 * k, 2.0 * k, sent=1600, meter=1500.0, preset="int8"),
            },
        )
        for k in (1.0, slower)
    ]


def test_gains_are_of_the_faster_baseline_in_the_same_round_until_the_slowest_host() -> None:
    found = rate_result(1e9, (0.99e9, 0.98e9), ranks(slower=1.25), QUIET)
    assert found.baseline == "fsdp2-bf16"
    assert found.rounds == 3
    assert found.variants["fsdp2-bf16"].gain is None
    int8 = found.variants["int8"]
    assert int8.step_ms.samples == (2500.0, 2500.0, 2500.0)
    assert int8.gain is not None
    assert int8.gain.value == pytest.approx(4.4 / 2.5)
    assert (int8.gain.low, int8.gain.high) == pytest.approx((4.0 / 2.5, 6.0 / 2.5))


def test_bytes_are_held_against_the_formula_and_the_meter() -> None:
    found = rate_result(None, (2e10,), ranks(), QUIET).variants
    assert found["fsdp2-bf16"].sent_per_parameter == pytest.approx(4.0)
    assert found["fsdp2-bf16"].of_formula == pytest.approx(4 / 3)  # 6 · (2 - 1) / 2 = 3
    assert found["fsdp2-bf16"].meter_over_interface is None
    assert found["int8"].meter_over_interface == pytest.approx(1500 / 1600)
    assert found["int8"].meter_per_parameter == pytest.approx(1.5)
    assert found["int8"].losses == pytest.approx((1.0, 0.5, 1 / 3))


def run_of(*rates: RateResult) -> LinkRun:
    fits = {name: fit_line(step_times(rates, name)) for name in rates[0].variants}
    return LinkRun(
        schema_version=1,
        hosts=2,
        delay_ms=0.0,
        congestion_control="cubic",
        workload=Workload(),
        parameters=PARAMETERS,
        rates=rates,
        fits=with_break_evens({name: fit for name, fit in fits.items() if fit}, BASELINES),
        environment={"OMP_NUM_THREADS": "1"},
        load_average=0.5,
        seconds=12.0,
        command="python -m benchmarks.link",
        **ORIGIN,
    )


def two_rates() -> LinkRun:
    slow = rate_result(1e9, (1e9, 1e9), ranks(), QUIET)
    fast = rate_result(
        None, (2e10, 2e10), ranks(slower=1.5), QUIET._replace(cpu_share=0.4, memory_stall_s=33.0)
    )
    return run_of(slow, fast)


def test_a_file_comes_back_as_it_was_and_others_are_refused(tmp_path: Path) -> None:
    run, path = two_rates(), tmp_path / "link.json"
    write_record(run, path)
    assert read_run(path) == run
    path.write_text(path.read_text().replace('"hosts": 2', '"hosts": "two"'))
    with pytest.raises(ValueError, match=r"link\.json: \$\.hosts = 'two'"):
        read_run(path)


def test_the_table_says_what_was_measured_and_who_else_was_there() -> None:
    lines = table(two_rates()).splitlines()
    assert any("others took 40% of the CPU" in text for text in lines)
    assert any("waited for it for 33 s" in text for text in lines)
    int8 = next(text.split() for text in lines if text.split()[:1] == ["int8"])
    assert " ".join(int8) == "int8 2.000 s 2.000-2.000 ×2.20 1.600 0.533 93.8% 0.50 s 0.3333"
    assert any(text.split()[0:1] == ["int8"] and "pays" in text for text in lines)


def test_a_run_is_drawn_again_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(two_rates(), tmp_path / "link.json")
    assert main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "int8" in capsys.readouterr().out
    write_record(run_of(two_rates().rates[1]), tmp_path / "link.json")  # one rate, and no fit
    assert main(["--redraw", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "1"], "rate = '1'"),
        (["--variants", "int8"], "add one of the baselines"),
        (["--rounds", "0"], "rounds = 0"),
        (["--width", "101"], "width = 101"),
        (["--width", "65536"], "GiB are free"),
        (["--redraw", "--out", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_memory_grows_with_variants_and_falls_with_hosts() -> None:
    small = replace(Workload(), width=256, depth=2, heads=4)
    assert small.host_bytes(2, 4) < small.host_bytes(3, 4) < small.host_bytes(3, 2)


def test_neighbours_have_shares() -> None:
    told = watch_neighbours()
    time.sleep(0.2)  # many times the grain of the kernel's clock, which in an instant may be all there is
    share, stall = told()
    assert 0 <= share <= 2  # over 1 only by that grain
    assert stall is None or stall >= 0
