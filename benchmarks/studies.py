"""Tables of what is measured and no case.

Their result files lie in folders of their own and fill markers like a case's:

    benchmarks:link               results/link/link.json
    benchmarks:accuracy           results/accuracy/accuracy.json         communication of fewer bits
    benchmarks:memory-accuracy    results/accuracy/memory/accuracy.json  memory of fewer bits
    benchmarks:ladder             results/ladder/ladder.json
    benchmarks:faults, soak       results/faults/faults.json, soak.json  runs into which faults were injected
    benchmarks:saving             results/saving/saving.json             checkpoints
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.accuracy.study import Comparison, Study
from benchmarks.accuracy.study import read as read_study
from benchmarks.accuracy.variants import BASELINE, VARIANTS
from benchmarks.faults import fault_table, read_faults, read_soak, soak_table
from benchmarks.ladder.result import Ladder, Row
from benchmarks.ladder.result import read as read_ladder
from benchmarks.ladder.rungs import RUNGS
from benchmarks.ladder.table import BASELINES as LADDER_BASELINES
from benchmarks.ladder.table import worlds
from benchmarks.ladder.workloads import WORKLOADS
from benchmarks.link.rate import rate_name
from benchmarks.link.result import LinkRun, VariantResult, read_run
from benchmarks.link.table import break_even_words
from benchmarks.link.workload import BASELINES
from benchmarks.record import Measured, Origin
from benchmarks.result import RESULTS
from benchmarks.saving.job import OURS
from benchmarks.saving.result import SavingRun, WorldResult
from benchmarks.saving.result import read_run as read_saving
from benchmarks.saving.table import TITLES, faults
from benchmarks.text import gain, quantity, table_row

__all__ = ["tables"]


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown by marker, of those that have a result file below the folder."""
    found = {}
    if (file := folder / "link" / "link.json").is_file():
        found["link"] = "\n".join(_link(read_run(file)))
    for marker, place in (("accuracy", "accuracy"), ("memory-accuracy", "accuracy/memory")):
        if (file := folder / place / "accuracy.json").is_file():
            found[marker] = "\n".join(_accuracy(read_study(file)))
    if (file := folder / "ladder" / "ladder.json").is_file():
        found["ladder"] = "\n".join(_ladder(read_ladder(file)))
    if (file := folder / "faults" / "faults.json").is_file():
        runs = read_faults(file)
        found["faults"] = "\n".join([*fault_table(runs), "", _notes([], runs)])
    if (file := folder / "faults" / "soak.json").is_file():
        soak = read_soak(file)
        found["soak"] = "\n".join([*soak_table(soak), "", _notes([], soak)])
    if (file := folder / "saving" / "saving.json").is_file():
        found["saving"] = "\n".join(_saving(read_saving(file)))
    return found


def _link(run: LinkRun) -> Iterator[str]:
    rates = [rate_name(rate.asked_bits_per_s) for rate in run.rates]
    size = f"{run.parameters / 1e6:.0f}M parameters, {run.hosts} hosts"
    yield table_row([f"a training step, {size}", "bytes a parameter", "of FSDP2 in bf16", *rates, "pays"])
    yield table_row(["---", *("---:" for _ in range(len(rates) + 3))])
    for name in run.rates[0].variants:
        by_rate = [rate.variants[name] for rate in run.rates]
        fit = run.fits.get(name)
        pays = break_even_words(fit).removeprefix("pays ") if fit and name not in BASELINES else ""
        chosen = sorted({v.preset for v in by_rate})
        label = f"auto ({', '.join(chosen)})" if name == "auto" else name
        sizes = [f"{by_rate[0].sent_per_parameter:.2f}", f"×{by_rate[0].of_formula:.3f}"]
        yield table_row([label, *(sizes if name != "auto" else ["", ""]), *map(_step, by_rate), pays])
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
    yield table_row([title, "mean", f"over {BASELINE}", "in ranges of its seeds", "worst seed", "verdict"])
    yield table_row(["---", *("---:" for _ in range(4)), "---"])
    first = compared[0]
    yield from (table_row(_cells(c, first.mean)) for c in compared)
    yield ""
    sent = any(VARIANTS[name].comm.preset != "none" for name in study.outcomes)
    compressed = f", {study.compressed:.1%} of them compressed" if sent else ""
    notes = [
        f"{study.parameters:,} parameters{compressed}. Loss of the fp32 "
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


_HEADLINE = ("2b-33k", 8)
_GIB = 2**30


def _ladder(ladder: Ladder) -> Iterator[str]:
    found = [{row.rung: row for row in rows} for rows in worlds(ladder.rows)]
    by_size = {(rungs["B1"].workload, rungs["B1"].world): rungs for rungs in found}
    rungs = by_size[_HEADLINE]
    title = f"{WORKLOADS[_HEADLINE[0]].title}, a GPU of {_HEADLINE[1]}"
    yield table_row([title, "GiB", *(f"of {base}" for base in LADDER_BASELINES), "step, of B4"])
    yield table_row(["---", *("---:" for _ in range(len(LADDER_BASELINES) + 2))])
    for row in rungs.values():
        label = f"{row.rung}: {RUNGS[row.rung].title}{' *' if RUNGS[row.rung].rounds else ''}"
        shares = [f"{row.peak_bytes / rungs[base].peak_bytes:.0%}" for base in LADDER_BASELINES]
        yield table_row(
            [label, f"{row.peak_bytes / _GIB:.1f}", *shares, f"{row.step_s / rungs['B4'].step_s:.2f}"]
        )
    yield ""
    yield table_row(["a GPU of 8, GiB", *LADDER_BASELINES, "least, exact", "of B2", "least *", "of B2"])
    yield table_row(["---", *("---:" for _ in range(len(LADDER_BASELINES) + 4))])
    for (workload, world), rungs in by_size.items():
        if world == _HEADLINE[1]:
            yield table_row([WORKLOADS[workload].title, *_ends(rungs, ladder)])
    yield ""
    notes = [
        f"Planned for {ladder.gpu}, not measured; steps are estimates ({ladder.assumed}). "
        "!: more than it has. *: numbers of fewer bits, see the study above."
    ]
    yield _notes(notes, ladder)


def _ends(rungs: dict[str, Row], ladder: Ladder) -> Iterator[str]:
    """The baselines of a workload and the lowest rungs, without and with rounding."""
    for base in LADDER_BASELINES:
        yield _gib(rungs[base], ladder)
    for rounds in (False, True):
        ours = [row for name, row in rungs.items() if RUNGS[name].rounds == rounds]
        least = min(ours, key=lambda row: row.peak_bytes)
        yield f"{_gib(least, ladder)} ({least.rung})"
        yield f"**{least.peak_bytes / rungs['B2'].peak_bytes:.0%}**"


def _gib(row: Row, ladder: Ladder) -> str:
    return f"{row.peak_bytes / _GIB:.1f}" + (" !" if row.peak_bytes > ladder.memory_bytes else "")


def _saving(run: SavingRun) -> Iterator[str]:
    state = f"{run.worlds[0].state_bytes / 1e6:,.0f} MB: {run.parameters / 1e6:.0f}M parameters"
    yield table_row([f"a checkpoint of {state}, moments, averages", *TITLES.values()])
    yield table_row(["---", *("---:" for _ in TITLES)])
    for world in run.worlds:
        for name in world.contestants:
            label = f"{name}, {world.ranks} rank{'s' if world.ranks > 1 else ''}"
            yield table_row([label, *(_of_save(world, name, metric) for metric in TITLES)])
    yield ""
    least = "; ".join(f"{w.ranks}: {_plain_calls(w)}" for w in run.worlds)
    same = ["After every load all tensors were what was saved, bit for bit."] if run.passed else []
    notes = [
        *(fault for world in run.worlds for fault in faults(world)),
        "Stall: what a training step waits for in a save. Both sync their files; ours also hashes them, "
        "syncs and renames the folder, and checks every hash before it loads (from the page cache). Between "
        "saves ours keeps the memory of its copy. On disk: over the bytes of the tensors.",
        "Step beside: begun during a save. Lost: by which one save delayed the training. Medians of "
        f"{run.worlds[0].rounds} rounds. {' '.join(same)}",
        f"As many bytes by one plain call a rank, by ranks: {least}. On {run.filesystem}; others took "
        + ", ".join(f"{world.others_cpu_share:.0%}" for world in run.worlds)
        + " of the CPU meanwhile.",
    ]
    yield _notes(notes, run)


def _of_save(world: WorldResult, name: str, metric: str) -> str:
    if not world.contestants[name]:
        return "no figure"
    measured = world.contestants[name][metric]
    if metric == "disk_bytes":
        return f"{measured.value / 1e6:,.1f} MB<br>{measured.value / world.state_bytes - 1:+.2%}"
    ratio = world.ratio(metric) if name == OURS else None
    return quantity(measured.value, measured.unit) + ("" if ratio is None else f"<br>{gain(ratio)}")


def _plain_calls(world: WorldResult) -> str:
    return ", ".join(f"{name} {quantity(limit.value, 'ms')}" for name, limit in world.limits.items())


def _notes(notes: Iterable[str], run: Origin) -> str:
    state = f"commit {(run.commit or 'unknown')[:10]}{' with changes' if run.dirty else ''}"
    repeat = re.sub(r" --out \S+", "", run.command)  # where the file lay at first
    torch = f"torch {run.versions.get('torch')}"
    machine = f"{run.device.count} × {run.device.name}, " if isinstance(run, Measured) else ""
    return (
        "<sub>"
        + "<br>".join([*notes, f"{machine}{torch}, {state}, {run.date[:10]}; `{repeat}`"])
        + "</sub>\n"
    )
