"""A modelled run as text: its assumptions, then for each rate the gains by number of GPUs."""

from collections.abc import Iterator, Sequence

from benchmarks.scale.result import Point, ScaleModel

__all__ = ["label", "table"]


def table(model: ScaleModel) -> str:
    """`gain` is the baseline's step over the variant's; the baseline has its step in ms."""
    lines = ["MODEL, not a measurement. It assumes:", *(f"  - {line}" for line in model.assumptions)]
    for gbit in sorted({p.gbit for p in model.points}):
        lines += ["", *_of_rate(model, gbit)]
    return "\n".join(lines)


def label(point: Point) -> str:
    """The variant, and its levels where there are two."""
    return f"{point.variant}, two levels" if point.levels == 2 else point.variant


def _of_rate(model: ScaleModel, gbit: float) -> Iterator[str]:
    found = [p for p in model.points if p.gbit == gbit]
    gpus = sorted({p.gpus for p in found})
    yield (
        f"MODEL: {gbit:g} Gbit/s a GPU; gain over {model.baseline}, whose step is in ms "
        f"(largest number of GPUs: time of codecs, and of the wire that shows)"
    )
    yield f"{'GPUs':>24}" + "".join(f"{n:>9}" for n in gpus) + f"{'codecs':>12}{'exposed':>12}"
    for name in dict.fromkeys(label(p) for p in found):
        yield _row(name, model.baseline, [p for p in found if label(p) == name], gpus)


def _row(name: str, baseline: str, row: Sequence[Point], gpus: Sequence[int]) -> str:
    cells = {p.gpus: f"{p.step_ms:.0f} ms" if name == baseline else f"×{p.gain:.2f}" for p in row}
    last = max(row, key=lambda p: p.gpus)
    return (
        f"{name:>24}"
        + "".join(f"{cells.get(n, ''):>9}" for n in gpus)
        + f"{last.codec_ms:>9.1f} ms{last.exposed_ms:>9.1f} ms"
    )
