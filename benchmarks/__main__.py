"""`python -m benchmarks`: run cases, render the report, compare two results."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from benchmarks import compare as comparison
from benchmarks import text
from benchmarks.case import Case, discover
from benchmarks.harness import run as measure
from benchmarks.page import page
from benchmarks.record import write_record
from benchmarks.report import ratio_of, render, unmarked
from benchmarks.result import RESULTS, Result, latest, read
from benchmarks.schema import json_schema
from benchmarks.studies import tables

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(markup=False, highlight=False)

_DOCUMENTS = [Path("README.md"), Path("docs/reliability.md")]
SCHEMA = Path(__file__).parent / "schema.json"


@app.command()
def run(
    cases: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE…]", help="All that fit here if none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of the one case [benchmarks/results/CASE.json]")
    ] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="Timed rounds [each case's own number]")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what there is and stop.")] = False,
) -> None:
    """Measure cases; exit code 1 if a gate is red.

    Example: python -m benchmarks run train_step_uvit_s2_cpu --repeat 15
    """
    known = discover()
    if list_:
        for case in known.values():
            console.print(f"{case.name}  {case.title}  ({', '.join(case.contestants)})")
        return
    chosen = _choose(known, cases)
    if out is not None and len(chosen) != 1:
        raise ValueError(f"out = {out}: holds one result, but {len(chosen)} cases are to run; name one case")
    results = []
    for case in chosen:
        results.append(measure(case, repeat))
        write_record(results[-1], out or RESULTS / f"{case.name}.json")
        _show(results[-1])
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


@app.command()
def report(
    readme: Annotated[
        list[Path] | None,
        typer.Option(
            help="Document with benchmark markers; repeatable",
            show_default="README.md and docs/reliability.md",
        ),
    ] = None,
    html: Annotated[Path, typer.Option(help="Page to write")] = Path("build/benchmarks.html"),
    results: Annotated[Path, typer.Option(help="Folder of result files")] = RESULTS,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a document is behind.")
    ] = False,
) -> None:
    """Render the newest results into the tables of documents, and of each case into an HTML page."""
    newest, studies, documents = latest(results), tables(results), readme or _DOCUMENTS
    before = {document: document.read_text("utf-8") for document in documents}
    after = {document: render(text, newest, studies) for document, text in before.items()}
    for name in unmarked("".join(before.values()), newest):
        console.print(f"{name}: recorded, but no document has <!-- benchmarks:{name}:start --> for it")
    if check:
        for document in documents:
            current = after[document] == before[document]
            console.print(
                f"{document}: {'up to date' if current else 'behind; run `python -m benchmarks report`'}"
            )
        raise typer.Exit(int(after != before))
    for document, rendered in after.items():
        document.write_text(rendered, "utf-8")
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page(newest), "utf-8")
    console.print(f"wrote {', '.join(map(str, documents))} and {html}")


@app.command()
def compare(a: Path, b: Path) -> None:
    """Two result files of one case, side by side."""
    before, after = read(a), read(b)
    rows = comparison.changes(before, after)
    for difference in comparison.differences(before, after):
        console.print(f"not the same in both: {difference}", style="yellow")
    table = Table("contestant", "metric", f"A {a}", f"B {b}", "B / A", "B is", title=before.case)
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(
            row.contestant, row.metric, text.measured(row.a), text.measured(row.b), ratio, row.verdict
        )
    console.print(table)


@app.command()
def schema() -> None:
    """Write benchmarks/schema.json, the JSON Schema of result files."""
    SCHEMA.write_text(json.dumps(json_schema(Result), indent=1) + "\n", "utf-8")
    console.print(f"wrote {SCHEMA}")


def _choose(known: Mapping[str, Case], names: Sequence[str] | None) -> list[Case]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"case = {name!r}: there is none of this name; there are {', '.join(known)}")
    if names:
        return [known[name] for name in names]
    for case in (case for case in known.values() if not case.fits):
        console.print(f"{case.name}: left out, there is no {case.device} device")
    return [case for case in known.values() if case.fits]


def _show(result: Result) -> None:
    table = Table("contestant", "metric", "median [95 %]", "gain over the baseline", title=result.title)
    for name, metrics in result.contestants.items():
        for metric, m in metrics.items():
            ratio = ratio_of(result, name, metric)
            table.add_row(name, metric, text.measured(m), text.gain(ratio) if ratio else "–")
    console.print(table)
    for line in (text.floor(result), text.gates(result), text.provenance(result)):
        console.print(line)


def main() -> None:
    """Entry point; a user's mistake is one line and exit code 2, not a traceback."""
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        app(prog_name="python -m benchmarks")
    except (ValueError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
