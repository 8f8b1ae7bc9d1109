"""How a run looks on rank 0's terminal: a live bar, or one plain line per record when nobody is watching."""

from collections.abc import Iterable
from typing import Any

import rich
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Display:
    """Shows progress on the console.

    Args:
        style: bar, plain, none, or auto (a bar on a terminal, else plain lines).
        total: last step.
        done: steps already done.
    """

    def __init__(self, style: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self._console = console or rich.get_console()
        self._total = total
        self._style = ("bar" if self._console.is_terminal else "plain") if style == "auto" else style
        self._bar = _Bar(self._console) if self._style == "bar" else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.status = status(record)
        elif self._style == "plain":
            left = (self._total - record["step"]) * record["step_ms"] / 1e3
            self._say(f"step {record['step']}/{self._total}  {status(record)}  ETA {duration(left)}")

    def note(self, text: str) -> None:
        if self._style != "none":
            self._say(f"note: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar(Progress):
    """A progress bar under a line of figures, so that neither is cut off on a narrow terminal."""

    def __init__(self, console: Console) -> None:
        self.status = ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA", TimeRemainingColumn())
        super().__init__(*columns, console=console, refresh_per_second=4)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.status)
        yield self.make_tasks_table(self.tasks)


def status(record: dict[str, Any]) -> str:
    """The figures of a record in one line; what is not known is left out."""
    parts = [
        ("loss {:.4f}", record.get("loss")),
        ("grad {:.3g}", record.get("grad_norm")),
        ("{:.1f} ms/step", record.get("step_ms")),
        ("{:.2f} clips/s", record.get("samples_per_s")),
        ("{:,.0f} tokens/s", record.get("tokens_per_s")),
        ("MFU {:.1%}", record.get("mfu")),
        ("{:.2f} GiB", record.get("memory_gib")),
    ]
    return "  ".join(form.format(value) for form, value in parts if value is not None)


def show_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print a run's summary (see `RunLog.summary`) as a table, then the skipped files by name."""
    console = console or rich.get_console()
    table = Table(title="run summary", show_header=False, title_justify="left")
    for label, form, value in _rows(summary):
        if value is not None:
            table.add_row(label, form.format(value))
    console.print(table)
    skipped = summary["skipped"]
    if skipped:
        lines = [f"skipped {len(skipped)} inputs:", *(f"  {s['source']}: {s['reason']}" for s in skipped)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        ("steps", "{:,}", summary["steps"]),
        ("samples trained on", "{:,}", summary["samples"]),
        ("wall time", "{}", duration(summary["wall_s"])),
        ("step time (median)", "{:.1f} ms", summary["step_ms"]),
        ("throughput", "{:.2f} clips/s", summary["samples_per_s"]),
        ("", "{:,.0f} tokens/s", summary["tokens_per_s"]),
        ("MFU", "{:.1%}", summary["mfu"]),
        ("final loss", "{:.4f}", summary["final_loss"]),
        ("peak memory of rank 0", "{:.2f} GiB", summary["peak_memory_gib"]),
        ("planned peak of rank 0", "{:.3f} GiB", summary["memory"].get("planned_gib")),
        ("peak memory of any rank", "{:.2f} GiB", summary["memory"].get("allocated_gib")),
        ("  reserved", "{:.2f} GiB", summary["memory"].get("reserved_gib")),
        ("energy per sample", "{:.2f} J", summary["energy_per_sample_joules"]),
        ("skipped inputs", "{}", len(summary["skipped"])),
        ("data workers restarted", "{}", summary["worker_restarts"] or None),
        ("updates passed over", "{}", summary["updates_passed_over"] or None),
        ("times gone back", "{}", summary["rollbacks"] or None),
        ("saves that failed", "{}", summary["failed_saves"] or None),
    ]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
