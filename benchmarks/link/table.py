"""A run as tables in plain text: one a rate, then the fits."""

from collections.abc import Iterator
from statistics import fmean

from benchmarks.link.fit import Fit
from benchmarks.link.rate import rate_name
from benchmarks.link.result import LinkRun, RateResult, VariantResult
from benchmarks.link.workload import BASELINES

__all__ = ["break_even_words", "table"]

_HEAD = ("variant", "step", "spread", "gain", "B/param", "of formula", "metered", "CPU", "loss")


def table(run: LinkRun) -> str:
    """One table a rate. `gain` is over the baseline; `B/param` what an interface sends in a step."""
    w = run.workload
    tokens = f"{w.batch} × {w.tokens // w.batch} tokens a host"
    head = [
        f"{run.hosts} hosts, {run.parameters / 1e6:.1f} M parameters, {tokens}, bf16, "
        f"TCP {run.congestion_control}, delay {run.delay_ms:g} ms; {run.device.count} cores of "
        f"{run.device.name} for all; {_load(run)}"
    ]
    return "\n".join([*head, *(line for rate in run.rates for line in _rate(rate)), *_fits(run)])


def _load(run: LinkRun) -> str:
    return f"load {run.load_average:.1f} before the run"


def _rate(rate: RateResult) -> Iterator[str]:
    achieved = fmean(rate.achieved_bits_per_s)
    yield ""
    yield (
        f"{rate_name(rate.asked_bits_per_s)}, achieved {rate_name(float(f'{achieved:.3g}'))}, "
        f"{rate.rounds} rounds, baseline {rate.baseline}; others took {rate.others_cpu_share:.0%} of the CPU"
    )
    if rate.memory_stall_s and rate.memory_stall_s > 1:
        yield f"memory was short: some process waited for it for {rate.memory_stall_s:.0f} s"
    yield "  ".join(f"{word:>{_WIDTHS[i]}}" for i, word in enumerate(_HEAD))
    for name, variant in rate.variants.items():
        yield "  ".join(f"{word:>{_WIDTHS[i]}}" for i, word in enumerate(_row(name, variant)))


_WIDTHS = (18, 9, 17, 7, 8, 10, 8, 8, 8)


def _row(name: str, v: VariantResult) -> tuple[str, ...]:
    chosen = f"auto: {v.preset}" if name == "auto" else name
    step = v.step_ms
    return (
        chosen,
        f"{step.value / 1e3:.3f} s",
        f"{min(step.samples) / 1e3:.3f}-{max(step.samples) / 1e3:.3f}",
        "" if v.gain is None else f"×{v.gain.value:.2f}",
        f"{v.sent_per_parameter:.3f}",
        f"{v.of_formula:.3f}",
        "" if v.meter_over_interface is None else f"{v.meter_over_interface:.1%}",
        f"{v.cpu_ms / 1e3:.2f} s",
        f"{v.losses[-1]:.4f}",
    )


def break_even_words(fit: Fit) -> str:
    """The break-even, for people."""
    if fit.break_even_bits_per_s is None:
        return "pays at every rate"
    if fit.break_even_bits_per_s == 0:
        return "pays at no rate"
    return f"pays below {fit.break_even_bits_per_s / 1e9:.2f} Gbit/s"


def _fits(run: LinkRun) -> Iterator[str]:
    if not run.fits:
        return
    yield ""
    yield "fitted: step = bytes · 8 / rate + rest"
    for name, fit in run.fits.items():
        words = "baseline" if name in BASELINES else break_even_words(fit)
        off = "through two points" if len(run.rates) == 2 else f"off by {fit.worst_error:.0%} at most"
        sent = fmean(rate.variants[name].sent_bytes for rate in run.rates)
        yield (
            f"{name:>18}  {fit.bytes / 1e6:7.0f} MB (sent {sent / 1e6:.0f} MB) + {fit.rest_s:.2f} s, "
            f"{off}: {words}"
        )
