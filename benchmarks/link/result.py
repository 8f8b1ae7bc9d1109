"""The result of a run over several rates, its file, and how it follows from what ranks recorded.

Step times are the slowest host's; bytes, CPU times and losses are means over hosts. A gain is the median over
rounds of the baseline's step over the variant's in the same round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from benchmarks.link.fit import Fit
from benchmarks.link.neighbours import Neighbours
from benchmarks.link.records import RankRecord, Record
from benchmarks.link.workload import BASELINES, FORMULA_BYTES, Workload
from benchmarks.record import Measured, read_record
from benchmarks.result import Measurement, Ratio
from benchmarks.stats import estimate

__all__ = [
    "SCHEMA_VERSION",
    "LinkRun",
    "RateResult",
    "VariantResult",
    "rate_result",
    "read_run",
    "step_times",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class VariantResult:
    """One variant at one rate."""

    preset: str = field(metadata={"help": "in use; of auto, what it chose; none: FSDP2's own collectives"})
    step_ms: Measurement = field(metadata={"help": "a step, until the slowest host has finished it"})
    gain: Ratio | None = field(metadata={"help": "over the baseline; null for it"})
    sent_bytes: float = field(metadata={"help": "a host's interface sends in a step, headers included"})
    sent_per_parameter: float = field(metadata={"help": "the same over the model's parameters"})
    of_formula: float = field(metadata={"help": "the same over 6 (W - 1) / W, FSDP2's in bf16 by rings"})
    meter_per_parameter: float | None = field(
        metadata={"help": "what the collectives' meter counts, over the parameters; null without one"}
    )
    meter_over_interface: float | None = field(metadata={"help": "share of the bytes that it knows of"})
    cpu_ms: float = field(metadata={"help": "CPU time of a host's process in a step; hosts share the CPU"})
    page_faults: float = field(metadata={"help": "of a host and step: memory that was not used again"})
    losses: tuple[float, ...] = field(metadata={"help": "one a measured step, after one of warm-up"})
    sampled: dict[str, float] = field(metadata={"help": "the meter of a step of which errors were taken"})
    said: tuple[str, ...] = field(metadata={"help": "what the collectives said at the start"})


@dataclass(frozen=True)
class RateResult:
    """All variants at one rate."""

    asked_bits_per_s: float | None = field(metadata={"help": "each way of each host; null: unlimited"})
    achieved_bits_per_s: tuple[float, ...] = field(
        metadata={"help": "of a TCP stream from each host to the next, just before"}
    )
    rounds: int = field(metadata={"help": "measured; each ran every variant once, after one of warm-up"})
    others_cpu_share: float = field(
        metadata={"help": "of the machine's CPU time, what processes of others took meanwhile"}
    )
    memory_stall_s: float | None = field(
        metadata={"help": "how long some process waited for memory; null where the kernel does not tell"}
    )
    baseline: str = field(metadata={"help": "the faster of FSDP2 in bf16 and the preset bf16"})
    variants: dict[str, VariantResult] = field(metadata={"help": "by name"})


@dataclass(frozen=True, kw_only=True)
class LinkRun(Measured):
    """One run; all hosts share the device."""

    schema_version: int = field(metadata={"help": "version of this format"})
    hosts: int = field(metadata={"help": "network namespaces, a rank each"})
    delay_ms: float = field(metadata={"help": "added to what each host sends"})
    congestion_control: str = field(metadata={"help": "TCP's, in the hosts"})
    workload: Workload = field(metadata={"help": "what was trained"})
    parameters: int = field(metadata={"help": "of the model"})
    rates: tuple[RateResult, ...] = field(metadata={"help": "in the order of the run"})
    fits: dict[str, Fit] = field(metadata={"help": "step time as a function of the rate, by variant"})
    environment: dict[str, str] = field(metadata={"help": "what all ranks ran under"})
    load_average: float = field(metadata={"help": "processes that ran on this machine before the run"})
    seconds: float = field(metadata={"help": "how long the run took"})


def rate_result(
    asked: float | None, achieved: Sequence[float], ranks: Sequence[RankRecord], meanwhile: Neighbours
) -> RateResult:
    """What all ranks together say of one rate."""
    names = list(ranks[0].records)
    every = {name: [rank.records[name] for rank in ranks] for name in names}
    steps = {name: _step_ms(records) for name, records in every.items()}
    baseline = min((name for name in names if name in BASELINES), key=lambda name: steps[name].value)
    variants = {
        name: _variant(
            name, every[name], steps[name], ranks[0].parameters,
            None if name == baseline else _gain(name, steps[baseline], steps[name]),
        )
        for name in names
    }  # fmt: skip
    return RateResult(
        asked_bits_per_s=asked,
        achieved_bits_per_s=tuple(achieved),
        rounds=len(steps[baseline].samples),
        others_cpu_share=meanwhile.cpu_share,
        memory_stall_s=meanwhile.memory_stall_s,
        baseline=baseline,
        variants=variants,
    )


def _variant(
    name: str, records: Sequence[Record], step_ms: Measurement, parameters: int, gain: Ratio | None
) -> VariantResult:
    sent = _mean(records, lambda record: fmean(record.sent_bytes))
    metered = all(record.meter_bytes for record in records)
    meter = _mean(records, lambda record: fmean(record.meter_bytes)) if metered else None
    peers = len(records)
    return VariantResult(
        preset=records[0].preset,
        step_ms=step_ms,
        gain=gain,
        sent_bytes=sent,
        sent_per_parameter=sent / parameters,
        of_formula=sent / parameters / (FORMULA_BYTES * (peers - 1) / peers),
        meter_per_parameter=None if meter is None else meter / parameters,
        meter_over_interface=None if meter is None else meter / sent,
        cpu_ms=1e3 * _mean(records, lambda record: median(record.cpu_s)),
        page_faults=_mean(records, lambda record: median(record.page_faults)),
        losses=tuple(fmean(losses) for losses in zip(*(r.losses for r in records), strict=True)),
        sampled=records[0].sampled,
        said=records[0].said,
    )


def _mean(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    return fmean(map(value, records))


def _step_ms(records: Sequence[Record]) -> Measurement:
    samples = tuple(1e3 * max(times) for times in zip(*(r.step_s for r in records), strict=True))
    low, value, high = estimate(samples)
    return Measurement(value, low, high, "ms", "lower", samples)


def _gain(name: str, baseline: Measurement, variant: Measurement) -> Ratio:
    gains = [b / v for b, v in zip(baseline.samples, variant.samples, strict=True)]
    low, value, high = estimate(gains)
    return Ratio(name, "step_ms", value, low, high)


def read_run(path: Path) -> LinkRun:
    """Read and check a run.

    Raises:
        ValueError: not a file of this format; names the file and the first fault.
    """
    return read_record(LinkRun, path, SCHEMA_VERSION)


def step_times(rates: Sequence[RateResult], name: str) -> Mapping[float | None, float]:
    """Seconds of a variant's step by the rate in bits a second; None: unlimited."""
    return {
        None if rate.asked_bits_per_s is None else fmean(rate.achieved_bits_per_s): (
            rate.variants[name].step_ms.value / 1e3
        )
        for rate in rates
        if name in rate.variants
    }
