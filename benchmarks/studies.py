"""README tables of the benchmarks that are no cases: the limited link and kept accuracy.

Their result files lie in folders of their own, `results/link/link.json` and `results/accuracy/accuracy.json`,
and fill the markers `benchmarks:link` and `benchmarks:accuracy` like a case's.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.accuracy.study import Comparison, Study
from benchmarks.accuracy.study import read as read_study
from benchmarks.accuracy.variants import BASELINE
from benchmarks.link.rate import rate_name
from benchmarks.link.result import LinkRun, VariantResult, read_run
from benchmarks.link.table import break_even_words
from benchmarks.link.workload import BASELINES
from benchmarks.record import Measured
from benchmarks.result import RESULTS

__all__ = ["tables"]


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown by marker, of those that have a result file below the folder."""
    found = {}
    if (file := folder / "link" / "link.json").is_file():
        found["link"] = "\n".join(_link(read_run(file)))
    if (file := folder / "accuracy" / "accuracy.json").is_file():
        found["accuracy"] = "\n".join(_accuracy(read_study(file)))
    return found


def _link(run: LinkRun) -> Iterator[str]:
    rates = [rate_name(rate.asked_bits_per_s) for rate in run.rates]
    size = f"{run.parameters / 1e6:.0f}M parameters, {run.hosts} hosts"
    yield _row([f"a training step, {size}", "bytes a parameter", "of FSDP2 in bf16", *rates, "pays"])
    yield _row(["---", *("---:" for _ in range(len(rates) + 3))])
    for name in run.rates[0].variants:
        by_rate = [rate.variants[name] for rate in run.rates]
        fit = run.fits.get(name)
        pays = break_even_words(fit).removeprefix("pays ") if fit and name not in BASELINES else ""
        chosen = sorted({v.preset for v in by_rate})
        label = f"auto ({', '.join(chosen)})" if name == "auto" else name
        sizes = [f"{by_rate[0].sent_per_parameter:.2f}", f"×{by_rate[0].of_formula:.3f}"]
        yield _row([label, *(sizes if name != "auto" else ["", ""]), *map(_step, by_rate), pays])
    yield ""
    notes = [
        "Step until the slowest host has finished; gain over the faster of fsdp2-bf16 and bf16 in the same "
        "round. Bytes as the hosts' interfaces sent them; of FSDP2 in bf16: over 6 (W - 1) / W a parameter.",
        f"Hosts are network namespaces that share the machine, TCP {run.congestion_control}; others took "
        + ", ".join(f"{rate.others_cpu_share:.0%}" for rate in run.rates)
        + " of its CPU meanwhile.",
    ]
    yield _notes(notes, run)


def _step(variant: VariantResult) -> str:
    seconds = f"{variant.step_ms.value / 1e3:.2f} s"
    return seconds if variant.gain is None else f"{seconds}<br>×{variant.gain.value:.2f}"


def _accuracy(study: Study) -> Iterator[str]:
    compared = [c for c in study.comparisons if c.weights == "masters" and c.mean is not None]
    seeds, steps = len(study.settings.seeds), study.settings.steps
    title = f"held-out loss after {steps:,} steps, {seeds} seeds, {study.settings.ranks} ranks"
    yield _row([title, "mean", f"over {BASELINE}", "in ranges of its seeds", "worst seed", "verdict"])
    yield _row(["---", *("---:" for _ in range(4)), "---"])
    first = compared[0]
    yield from (_row(_cells(c, first.mean)) for c in compared)
    yield ""
    notes = [
        f"{study.parameters:,} parameters, {study.compressed:.1%} of them compressed. Loss of the fp32 "
        f"masters; a seed is compared with the same seed of {BASELINE}, whose seeds have a range of "
        f"{first.baseline_range or 0:.5f} and a standard deviation of {first.baseline_std or 0:.5f}.",
        *(f"{name}: {outcome.fault}." for name, outcome in study.outcomes.items() if outcome.fault),
    ]
    yield _notes(notes, study)


def _cells(c: Comparison, baseline: float | None) -> list[str]:
    if c.variant == BASELINE:
        return [c.variant, _number(c.mean, ".5f"), "", "", "", ""]
    share = c.gap / c.baseline_range if c.gap is not None and c.baseline_range else None
    side = "lower" if c.gap is not None and c.gap < 0 else "higher"
    verdict = "within std" if c.within_std else "within range" if c.within_range else f"**outside, {side}**"
    numbers = (
        _number(c.mean, ".5f"),
        _share(c.gap, baseline),
        _number(share, "+.2f"),
        _share(c.worst, baseline),
    )
    return [c.variant, *numbers, verdict]


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _share(difference: float | None, whole: float | None) -> str:
    return _number(None if difference is None or not whole else difference / whole, "+.2%")


def _notes(notes: Iterable[str], run: Measured) -> str:
    state = f"commit {(run.commit or 'unknown')[:10]}{' with changes' if run.dirty else ''}"
    repeat = re.sub(r" --out \S+", "", run.command)  # where the file lay at first
    torch = f"torch {run.versions.get('torch')}"
    machine = f"{run.device.count} × {run.device.name}, {torch}, {state}, {run.date[:10]}"
    return "<sub>" + "<br>".join([*notes, f"{machine}; `{repeat}`"]) + "</sub>\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
