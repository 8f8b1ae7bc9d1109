"""A ladder as text: bytes of each rung, and what is left of the baselines'."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from benchmarks.ladder.result import Ladder, MeasuredLadder, MeasuredRow, Row
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.workloads import WORKLOADS
from benchmarks.record import Origin

__all__ = ["BASELINES", "measured_table", "table", "worlds"]

BASELINES = ("B1", "B2", "B4")
_GIB = 2**30
R = TypeVar("R", Row, MeasuredRow)


def worlds(rows: Iterable[R]) -> Iterator[list[R]]:
    """The rungs of each workload on each world."""
    for _, some in groupby(rows, lambda row: (row.workload, row.world)):
        yield list(some)


def table(ladder: Ladder) -> str:
    """For a terminal."""
    parts = ["\n".join(_of_world(rows, ladder)) for rows in worlds(ladder.rows)]
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


def measured_table(ladder: MeasuredLadder) -> str:
    """For a terminal."""
    parts = ["\n".join(_of_measured(rows)) for rows in worlds(ladder.rows)]
    return "\n\n".join([*parts, "\n".join(_measured_notes(ladder))])


def _of_measured(rows: Sequence[MeasuredRow]) -> Iterator[str]:
    by_rung = {row.rung: row for row in rows}
    yield f"{WORKLOADS[rows[0].workload].title}, rank 0 of {rows[0].world}"
    shares = (f"of {name}" for name in BASELINES)
    head = ["", "", "planned GiB", "allocated", "planned/allocated", "reserved", *shares, "step"]
    yield from _aligned([head, *([*_measured_cells(row, by_rung)] for row in rows)])
    yield from (f"{row.rung}: out of memory, {row.oom}" for row in rows if row.oom)


def _measured_cells(row: MeasuredRow, by_rung: dict[str, MeasuredRow]) -> Iterator[str]:
    held = row.allocated_bytes
    yield row.rung
    yield RUNGS[row.rung].title + (" *" if RUNGS[row.rung].rounds else "")
    yield f"{row.planned_bytes / _GIB:.3f}"
    yield f"{held / _GIB:.3f}" if held else "OOM"
    yield f"{row.planned_bytes / held:.3f}" if held else ""
    yield f"{row.reserved_bytes / _GIB:.3f}" if row.reserved_bytes else ""
    for name in BASELINES:
        base = by_rung.get(name)
        theirs = base.allocated_bytes if base and row.rung not in ("B1", name) else None
        yield f"{held / theirs:.1%}" if held and theirs else ""
    base = by_rung.get("B4")
    of_base = f"  {row.step_s / base.step_s:.2f} of B4" if row.step_s and base and base.step_s else ""
    yield f"{row.step_s:.3f} s{of_base}" if row.step_s else ""


def _measured_notes(ladder: MeasuredLadder) -> Iterator[str]:
    rehearsed = ladder.kind == "rehearsal"
    yield f"{'Rehearsed with tiny models' if rehearsed else 'Measured'} on {ladder.device.name}."
    yield "Rank 0 of a process group that moves no data: memory is that of a real rank 0, steps are without"
    yield "communication. Allocated: by tensors; reserved: by the allocator. *: rounds, so it has no gate."
    for gate in ladder.gates:
        if not gate.passed:
            errors = f"loss {gate.loss_error:.1e}, gradients {gate.gradient_error:.1e}"
            yield f"RED GATE, no times: {gate.workload} {gate.rung}, {errors} off, limit {gate.limit:.1e}"
    if ladder.gates and all(gate.passed for gate in ladder.gates):
        worst = max(gate.gradient_error for gate in ladder.gates)
        yield f"Gates are green: at a tiny size gradients are at most {worst:.1e} off B1 in fp32."
    for one in ladder.missing:
        what = "FAILED" if one.failed else "left out"
        yield f"{what}: {one.workload} {one.rung or 'all rungs'} on {one.world}: {one.reason}"
    yield from _place(ladder)


def _notes(ladder: Ladder) -> Iterator[str]:
    yield f"Planned for {ladder.gpu}, not measured. !: more than it has. *: rounds, see the accuracy study."
    yield f"Steps are estimates: {ladder.assumed}."
    yield from _place(ladder)


def _place(ladder: Origin) -> Iterator[str]:
    commit = (ladder.commit or "unknown")[:10] + (" with changes" if ladder.dirty else "")
    yield f"torch {ladder.versions.get('torch')}, commit {commit}; {ladder.command}"
