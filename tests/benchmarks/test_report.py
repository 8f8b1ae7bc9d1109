import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from benchmarks import text
from benchmarks.__main__ import app
from benchmarks.compare import changes, differences
from benchmarks.page import page
from benchmarks.record import write_record
from benchmarks.report import render, table, unmarked
from benchmarks.result import Measurement, Ratio, latest

README = "# x\n\n<!-- benchmarks:toy:start -->\nold\n<!-- benchmarks:toy:end -->\n\ntail\n"


def red(result):
    gate = replace(result.gates[0], passed=False, error=None)
    return replace(result, gates=(gate,), ratios=())


def test_only_what_is_between_the_markers_changes_and_only_once(result):
    once = render(README, [result])
    assert once == README.replace("old\n", table(result))
    assert render(once, [result]) == once


def test_table_has_the_numbers_of_the_result(result):
    rows = table(result).splitlines()
    assert rows[:4] == [
        "| A <toy> \\| step | step | peak |",
        "| --- | ---: | ---: |",
        "| plain | 2.050 s | 300 MiB |",
        "| ours | 1.025 s<br>**×2.000 [1.900 – 2.100]** | 200 MiB<br>**×1.500** |",
    ]
    assert "Floor 500 ms: 1,000.0 GFLOP and 1.00 GB (a product)" in rows[-1]
    assert "A CPU (8 GiB), 2 threads at 97%, torch 2.13.0" in rows[-1]
    assert "commit 0123456789, 2026-01-02, 3 rounds; `python -m benchmarks run toy`" in rows[-1]


def test_a_gain_within_the_spread_is_not_bold(result):
    shown = table(replace(result, ratios=(Ratio("ours", "step_ms", 1.2, 0.9, 1.4), *result.ratios[1:])))
    assert "1.025 s<br>×1.200 [0.900 – 1.400] | 200 MiB<br>**×1.500** |" in shown


def test_no_gain_is_shown_behind_a_red_gate(result):
    shown = table(red(result))
    assert "×" not in shown.splitlines()[3]
    assert "no ratio" in shown
    assert "loss not finite **exceeds** 1e-05" in shown


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            README.replace(":toy:", ":other:"),
            "benchmarks:other: no result is recorded for this marker; recorded: toy",
        ),
        (
            README.replace("<!-- benchmarks:toy:end -->", ""),
            "benchmarks:toy: a start marker needs its end marker",
        ),
        (
            README.replace("<!-- benchmarks:toy:start -->", ""),
            "benchmarks:toy: a start marker needs its end marker",
        ),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(result, document, message):
    with pytest.raises(ValueError, match=message):
        render(document, [result])


def test_a_result_without_a_place_is_named(result):
    assert unmarked(README, [result, replace(result, case="other")]) == ["other"]


def test_the_newest_result_of_a_case_counts(result, tmp_path):
    newer = replace(result, date="2026-03-01T00:00:00+00:00", threads=1)
    write_record(newer, tmp_path / "a.json")
    write_record(result, tmp_path / "b.json")
    write_record(replace(result, case="another"), tmp_path / "c.json")
    assert latest(tmp_path) == [replace(result, case="another"), newer]


def test_report_check_fails_until_the_report_is_written(result, tmp_path):
    readme, html = tmp_path / "README.md", tmp_path / "out" / "page.html"
    readme.write_text(README)
    write_record(result, tmp_path / "toy.json")
    arguments = ["report", "--readme", str(readme), "--html", str(html), "--results", str(tmp_path)]
    runner = CliRunner()
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 1
    assert readme.read_text() == README
    assert not html.exists()
    assert runner.invoke(app, arguments).exit_code == 0
    assert html.read_text() == page([result])
    assert runner.invoke(app, [*arguments, "--check"]).exit_code == 0


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_asks_for_nothing(result):
    tags = Tags()
    tags.feed(page([result, replace(red(result), case="red")]))
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not [a for _, attributes in tags.seen for a in attributes if a in ("src", "href", "srcset")]
    assert "url(" not in page([result])
    assert "@import" not in page([result])


def test_bars_are_as_long_as_their_numbers(result):
    widths = re.findall(r'<rect class="(\w+)" width="([\d.]+)"', page([result]))
    longest_ms = 2100
    assert widths[:2] == [
        ("base", f"{100 * 2050 / longest_ms:.3f}"),
        ("ours", f"{100 * 1025 / longest_ms:.3f}"),
    ]
    assert widths[2:] == [("base", "100.000"), ("ours", f"{100 * 2 / 3:.3f}")]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.01, 1.2, "good"), (0.9, 1.1, "soft"), (0.8, 0.99, "bad")]
)
def test_page_colours_only_what_the_spread_allows(result, low, high, verdict):
    shown = page([replace(result, ratios=(Ratio("ours", "step_ms", 1.0, low, high),))])
    assert f'<span class="{verdict}">×1.000 [{low:.3f} – {high:.3f}]</span>' in shown


def test_page_escapes_names(result):
    assert "A &lt;toy&gt; | step" in page([result])
    assert "<toy>" not in page([result])


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0, "bytes", "0 bytes"),
        (1023, "bytes", "1,023 B"),
        (1536, "bytes", "1.500 KiB"),
        (123456789, "bytes", "117.7 MiB"),
        (2**40, "bytes", "1,024 GiB"),
        (4321.9, "ms", "4.322 s"),
        (0.0123, "ms", "12.30 µs"),
        (98.76, "GB/s", "98.76 GB/s"),
    ],
)
def test_quantities(value, unit, shown):
    assert text.quantity(value, unit) == shown


def test_compare_calls_noise_noise(result):
    def with_step(*samples):
        step = Measurement(sorted(samples)[1], min(samples), max(samples), "ms", "lower", samples)
        return replace(
            result, contestants=result.contestants | {"ours": result.contestants["ours"] | {"step_ms": step}}
        )

    def verdict(other):
        return {(c.contestant, c.metric): c.verdict for c in changes(result, other)}["ours", "step_ms"]

    assert verdict(with_step(1040, 1060, 1080)) == "within the spread"
    assert verdict(with_step(1051, 1060, 1080)) == "worse"
    assert verdict(with_step(900, 950, 999)) == "better"
    assert verdict(result) == "the same"


def test_compare_gives_b_over_a_for_every_metric(result):
    half = replace(result.contestants["ours"]["peak_bytes"], value=100 * 2**20)
    other = replace(result, contestants={"ours": result.contestants["ours"] | {"peak_bytes": half}})
    assert {c.metric: c.ratio for c in changes(result, other)} == {"step_ms": 1.0, "peak_bytes": 0.5}


def test_compare_refuses_different_cases(result, tmp_path):
    with pytest.raises(ValueError, match="case = 'toy' and 'other': only two results of one case"):
        changes(result, replace(result, case="other"))


def test_compare_says_what_else_differs(result):
    other = replace(red(result), threads=4, versions=result.versions | {"torch": "2.12.0"})
    assert differences(result, result) == []
    assert differences(result, other) == ["gates of B: red", "threads: 2 and 4", "torch: 2.13.0 and 2.12.0"]


def test_compare_from_the_command_line(result, tmp_path):
    write_record(result, tmp_path / "a.json")
    write_record(replace(result, threads=4), tmp_path / "b.json")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 0
    assert "not the same in both: threads: 2 and 4" in done.output
