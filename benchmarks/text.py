"""Numbers, as people read them; used by the tables, the page and the terminal alike."""

from collections.abc import Iterable

from benchmarks.result import Measurement, Ratio, Result

_SCALES = {
    "bytes": ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "B")),
    "ms": ((1e3, "s"), (1, "ms"), (1e-3, "µs")),
}


def quantity(value: float, unit: str) -> str:
    """`quantity(123456789, "bytes")` is "117.7 MiB"; four digits, so that nothing is claimed by rounding."""
    for scale, name in _SCALES.get(unit, ()):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {name}"
    return f"{_digits(value)} {unit}"


def table_row(cells: Iterable[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _digits(value: float) -> str:
    return f"{value:,.{max(0, 3 - len(str(int(abs(value)))) + 1)}f}" if value % 1 else f"{value:,.0f}"


def measured(m: Measurement) -> str:
    """Value with its interval, which a counted metric does not have."""
    interval = f" [{quantity(m.low, m.unit)} – {quantity(m.high, m.unit)}]" if len(m.samples) > 1 else ""
    return quantity(m.value, m.unit) + interval


def gain(ratio: Ratio) -> str:
    interval = f" [{ratio.low:.3f} – {ratio.high:.3f}]" if ratio.low != ratio.high else ""
    return f"×{ratio.value:.3f}{interval}"


def title(metric: str) -> str:
    """The column title of a metric: its unit is said by the values."""
    return metric.removesuffix("_ms").removesuffix("_bytes").replace("_", " ")


def provenance(result: Result) -> str:
    """Where the numbers are from, in a line."""
    device = result.device
    place = f"{device.count} × {device.name} ({quantity(device.memory_bytes, 'bytes')})"
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    if device.kind == "cpu":  # well under 100 %: the machine was busy with something else
        threads += f" at {result.cpu_share:.0%}"
    commit = f"commit {result.commit[:10]}" if result.commit else "no commit"
    code = f"torch {result.versions['torch']}, {commit}{' + changes' if result.dirty else ''}"
    return f"{place}, {threads}, {code}, {result.date[:10]}, {result.rounds} rounds"


def floor(result: Result) -> str:
    """What the work must cost and how near each contestant comes, in a line."""
    f = result.floor
    rates = f"{f.flops_per_s / 1e9:,.0f} GFLOP/s and {f.bytes_per_s / 1e9:,.1f} GB/s measured here"
    must = f"{f.flops / 1e9:,.1f} GFLOP and {f.bytes / 1e9:,.2f} GB ({f.reason})"
    return f"Floor {quantity(f.floor_ms, 'ms')}: {must} at {rates}."


def gates(result: Result) -> str:
    """Each gate with what was measured, in a line."""
    parts = []
    for gate in result.gates:
        error = "not finite" if gate.error is None else f"{gate.error:.1e}"
        sign = "≤" if gate.passed else "**exceeds**"
        parts.append(f"{gate.contestant}: {gate.name} {error} {sign} {gate.limit:.0e}")
    return "Gates: " + ("; ".join(parts) or "none") + "."
