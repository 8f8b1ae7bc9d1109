"""README tables from result files: what a README says is what was measured.

A README holds `<!-- benchmarks:CASE:start -->` and `<!-- benchmarks:CASE:end -->`; everything between the two
is replaced by the newest result of that case. Rendering twice changes nothing.
"""

import re
from collections.abc import Iterable, Mapping

from benchmarks import text
from benchmarks.result import Ratio, Result

_BLOCK = re.compile(
    r"(?P<start><!-- benchmarks:(?P<name>\S+):start -->\n).*?(?P<end><!-- benchmarks:(?P=name):end -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- benchmarks:(\S+):(?:start|end) -->")


def render(document: str, results: Iterable[Result], others: Mapping[str, str] | None = None) -> str:
    """The document with every marked block rewritten.

    Args:
        results: of cases.
        others: tables that are ready, by their marker.
    Raises:
        ValueError: a marker without its partner, or a block whose case has no recorded result.
    """
    tables = {result.case: table(result) for result in results} | dict(others or {})

    def block(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            known = ", ".join(sorted(tables)) or "none"
            raise ValueError(
                f"benchmarks:{match['name']}: no result is recorded for this marker; recorded: {known}"
            )
        return f"{match['start']}{tables[match['name']]}{match['end']}"

    for orphan in _MARKER.findall(_BLOCK.sub("", document)):
        raise ValueError(
            f"benchmarks:{orphan}: a start marker needs its end marker on a later line, and none between"
        )
    return _BLOCK.sub(block, document)


def unmarked(document: str, results: Iterable[Result]) -> list[str]:
    """Cases that have a result and no place in the document."""
    return [result.case for result in results if f"<!-- benchmarks:{result.case}:start -->" not in document]


def table(result: Result) -> str:
    """Markdown: contestants down, metrics across, then where the numbers are from."""
    metrics = list(result.contestants[result.baseline])
    header = [result.title, *(text.title(metric) for metric in metrics)]
    rows = [[name, *_cells(result, name, metrics)] for name in result.contestants]
    lines = [
        text.table_row(header),
        text.table_row(["---", *("---:" for _ in metrics)]),
        *map(text.table_row, rows),
    ]
    notes = [text.floor(result), text.gates(result), f"{text.provenance(result)}; `{result.command}`"]
    return "\n".join([*lines, "", "<sub>" + "<br>".join(notes) + "</sub>", ""])


def _cells(result: Result, name: str, metrics: list[str]) -> list[str]:
    cells = []
    for metric in metrics:
        m = result.contestants[name][metric]
        ratio = ratio_of(result, name, metric)
        gain = text.gain(ratio) if ratio else "no ratio"
        if ratio and not ratio.low <= 1 <= ratio.high:  # bold: more than the spread
            gain = f"**{gain}**"
        cells.append(text.quantity(m.value, m.unit) + ("" if name == result.baseline else f"<br>{gain}"))
    return cells


def ratio_of(result: Result, contestant: str, metric: str) -> Ratio | None:
    """The gain of a contestant in a metric; None for the baseline and behind a red gate."""
    return next((r for r in result.ratios if (r.contestant, r.metric) == (contestant, metric)), None)
