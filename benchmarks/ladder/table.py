"""A ladder as text: bytes of each rung, and what is left of the baselines'."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from benchmarks.ladder.result import Ladder, Row
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.workloads import WORKLOADS

__all__ = ["BASELINES", "table", "worlds"]

BASELINES = ("B1", "B2", "B4")
_GIB = 2**30


def worlds(ladder: Ladder) -> Iterator[list[Row]]:
    """The rungs of each workload on each world."""
    for _, rows in groupby(ladder.rows, lambda row: (row.workload, row.world)):
        yield list(rows)


def table(ladder: Ladder) -> str:
    """For a terminal."""
    parts = ["\n".join(_of_world(rows, ladder)) for rows in worlds(ladder)]
    return "\n\n".join([*parts, "\n".join(_notes(ladder))])


def _of_world(rows: Iterable[Row], ladder: Ladder) -> Iterator[str]:
    rows = list(rows)
    by_rung = {row.rung: row for row in rows}
    yield f"{WORKLOADS[rows[0].workload].title}, rank 0 of {rows[0].world}"
    head = ["", "", "GiB", *(f"of {name}" for name in BASELINES), "host GiB", "TFLOP", "step, estimated"]
    yield from _aligned([head, *([*_cells(row, by_rung, ladder)] for row in rows)])


def _cells(row: Row, by_rung: dict[str, Row], ladder: Ladder) -> Iterator[str]:
    yield row.rung
    yield RUNGS[row.rung].title + (" *" if RUNGS[row.rung].rounds else "")
    yield f"{row.peak_bytes / _GIB:.2f}" + (" !" if row.peak_bytes > ladder.memory_bytes else "")
    for name in BASELINES:
        base = by_rung.get(name)
        yield f"{row.peak_bytes / base.peak_bytes:.1%}" if base and row.rung not in ("B1", name) else ""
    yield f"{row.host_bytes / _GIB:.1f}" if row.host_bytes else ""
    yield f"{row.flops / 1e12:,.0f}"
    base = by_rung.get("B4")
    yield f"{row.step_s:.3f} s" + (f"  {row.step_s / base.step_s:.2f} of B4" if base else "")


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first two columns from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _notes(ladder: Ladder) -> Iterator[str]:
    yield f"Planned for {ladder.gpu}, not measured. !: more than it has. *: rounds, see the accuracy study."
    yield f"Steps are estimates: {ladder.assumed}."
    commit = (ladder.commit or "unknown")[:10] + (" with changes" if ladder.dirty else "")
    yield f"torch {ladder.versions.get('torch')}, commit {commit}; {ladder.command}"
