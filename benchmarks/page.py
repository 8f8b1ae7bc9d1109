"""One HTML page for all results: self-contained (no request leaves it), for phones and dark rooms too.

Bars are inline SVG stretched to the width at hand, words are HTML, so that both stay readable at any size.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from benchmarks import text
from benchmarks.report import ratio_of
from benchmarks.result import Measurement, Ratio, Result

_STYLE = Path(__file__).with_suffix(".css").read_text("utf-8")


def page(results: Iterable[Result]) -> str:
    body = "\n".join(_section(result) for result in results) or "<p>No results are recorded.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmarks</title><style>{_STYLE}</style></head>\n<body><h1>Benchmarks</h1>\n"
        '<p class="soft">Medians, in brackets their 95 % intervals. × over 1 is better than the baseline. '
        f"Dashed line: the floor that the work's FLOPs and bytes imply.</p>\n{body}\n</body></html>\n"
    )


def _section(result: Result) -> str:
    metrics = result.contestants[result.baseline]
    plots = "\n".join(_metric(result, name) for name in metrics)
    tone = "soft" if result.passed else "bad"
    gates = f'<p class="{tone}">{escape(text.gates(result).replace("**", ""))}</p>'
    notes = f'<p class="soft notes">{escape(text.floor(result))}</p>{gates}'
    source = f'<p class="soft">{escape(text.provenance(result))}<br><code>{escape(result.command)}</code></p>'
    heading = f"<h2>{escape(result.title)}</h2>"
    return f'<section id="{escape(result.case)}">{heading}{plots}\n{notes}{source}</section>'


def _metric(result: Result, metric: str) -> str:
    measured = {name: metrics[metric] for name, metrics in result.contestants.items()}
    scale = max(m.high for m in measured.values()) or 1.0
    floor = result.floor.floor_ms / scale if next(iter(measured.values())).unit == "ms" else None
    rows = "".join(_bar(result, name, metric, scale, floor) for name in measured)
    better = f'<span class="soft">{next(iter(measured.values())).better} is better</span>'
    return f"<h3>{escape(text.title(metric))} {better}</h3>{rows}{_trace(result, measured)}"


def _bar(result: Result, name: str, metric: str, scale: float, floor: float | None) -> str:
    m = result.contestants[name][metric]
    gain = "" if name == result.baseline else " " + _gain(ratio_of(result, name, metric))
    shapes = f'<rect class="{_kind(result, name)}" width="{100 * m.value / scale:.3f}" y="1" height="8"/>'
    shapes += _line(100 * m.low / scale, 100 * m.high / scale) if len(m.samples) > 1 else ""
    if floor is not None:
        shapes += f'<line class="floor" x1="{100 * floor:.3f}" x2="{100 * floor:.3f}" y1="0" y2="10"/>'
    svg = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>'
    value = f'<span class="value">{escape(text.measured(m))}{gain}</span>'
    return f'<div class="row"><span>{escape(name)}</span>{svg}{value}</div>'


def _gain(ratio: Ratio | None) -> str:
    if ratio is None:
        return '<span class="bad">no ratio</span>'
    verdict = "good" if ratio.low > 1 else "bad" if ratio.high < 1 else "soft"
    return f'<span class="{verdict}">{text.gain(ratio)}</span>'


def _line(start: float, end: float) -> str:
    return f'<line x1="{start:.3f}" x2="{end:.3f}" y1="5" y2="5"/>'


def _trace(result: Result, measured: dict[str, Measurement]) -> str:
    """Every sample in the order it was taken: drift and outliers show here."""
    samples = [sample for m in measured.values() for sample in m.samples]
    low, high = min(samples), max(samples)
    unit = next(iter(measured.values())).unit
    if len(samples) == len(measured) or low == high:
        return ""
    lines = ""
    for name, m in measured.items():
        step = 100 / max(len(m.samples) - 1, 1)
        points = " ".join(
            f"{i * step:.2f},{38 - 36 * (s - low) / (high - low):.2f}" for i, s in enumerate(m.samples)
        )
        lines += f'<polyline class="{_kind(result, name)}" points="{points}"/>'
    caption = f"Round by round, {text.quantity(low, unit)} (bottom) to {text.quantity(high, unit)} (top)."
    svg = f'<svg class="trace" viewBox="0 0 100 40" preserveAspectRatio="none" role="img">{lines}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _kind(result: Result, contestant: str) -> str:
    return "base" if contestant == result.baseline else "ours"
