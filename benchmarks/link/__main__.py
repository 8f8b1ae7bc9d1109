"""`python -m benchmarks.link`: what compressed collectives gain over a limited network.

Makes hosts as network namespaces, limits their cables with tc, trains one model between them by torchrun with
every variant in turn, and does so at each rate. Needs root and iproute2. See docs/benchmarks.md.
"""

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import measured_on
from benchmarks.link.fit import fit_line, with_break_evens
from benchmarks.link.hosts import Hosts, Unavailable, hosts
from benchmarks.link.launch import ENVIRONMENT, HostFailed, run_job
from benchmarks.link.neighbours import available_bytes, watch_neighbours
from benchmarks.link.plot import plot
from benchmarks.link.rate import parse_rate, rate_name
from benchmarks.link.result import (
    SCHEMA_VERSION,
    LinkRun,
    RateResult,
    rate_result,
    read_run,
    step_times,
)
from benchmarks.link.table import table
from benchmarks.link.workload import BASELINES, TINY, VARIANTS, Job, Workload, check_variants
from benchmarks.record import write_record

__all__ = ["main"]

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  python -m benchmarks.link                                 all variants at four rates, 20 minutes
  python -m benchmarks.link --smoke                         two hosts and a tiny model: does it run here?
  python -m benchmarks.link --check --rates 5gbit           only make hosts and measure the rate
  python -m benchmarks.link --rates 1gbit --variants fsdp2-bf16 bf16 int8 --rounds 9
  python -m benchmarks.link --rates unlimited --profile     where a step's time goes, by operator
  python -m benchmarks.link --redraw --out build/link       table and picture of a run that is there

variants:
  fsdp2-fp32  FSDP2's own collectives, gradients in fp32        fsdp2-bf16  the same, gradients in bf16
  bf16, int8, int8-int4, int4-delta, auto                       presets of dtrain.comm.CommConfig

reading it:
  gain        the faster of fsdp2-bf16 and bf16, over the variant; over 1 is faster
  B/param     what a host's interface sent in a step, over the parameters
  of formula  the same over 6 (W - 1) / W, what FSDP2 in bf16 must send by rings; gloo's own
              reduce-scatter sends twice what a ring does, so that fsdp2-bf16 has 1.33 here
  metered     what the collectives' own meter counted, over what the interface sent
  CPU         time of one host's process; all hosts share this machine's cores, so that codecs and
              compute weigh more than they would on machines of their own
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a host failed, 2 where an argument does not fit."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parser().parse_args(argv)
    try:
        if arguments.redraw:
            run = read_run(arguments.out / "link.json")
        elif arguments.check:
            return _check(arguments)
        else:
            run = _measure(arguments)
        plot(run, arguments.out / "plot.png")
        print(table(run))
    except (Unavailable, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HostFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    standard = Workload()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.link",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rates", nargs="+", default=["0.2gbit", "1gbit", "5gbit", "unlimited"], metavar="RATE",
        help="of each host and way: 200mbit, 1gbit, unlimited [0.2gbit 1gbit 5gbit unlimited]")  # fmt: skip
    add("--hosts", type=int, default=4, metavar="N", help="network namespaces, a rank each [4]")
    add("--delay-ms", type=float, default=0.0, metavar="MS", help="added to what a host sends, by netem [0]")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="V", help="[all]")
    add("--rounds", type=int, metavar="N", help="measured rounds at every rate [3 to 9, by --seconds]")
    add("--seconds", type=float, default=150.0, metavar="S", help="for the rounds of a rate, about [150]")
    add("--width", type=int, default=standard.width, help=f"of the model [{standard.width}]")
    add("--depth", type=int, default=standard.depth, help=f"blocks but one [{standard.depth}]")
    add("--batch", type=int, default=standard.batch, help=f"samples of 17 tokens a host [{standard.batch}]")
    add("--out", type=Path, default=Path("build/link"), metavar="DIR",
        help="for link.json, plot.png, logs of the hosts [build/link]")  # fmt: skip
    add("--profile", action="store_true", help="a step more under torch.profiler: OUT/RATE/profile-V.txt")
    add("--smoke", action="store_true", help="2 hosts, a tiny model, 0.2gbit, 2 rounds")
    add("--check", action="store_true", help="make hosts, measure the rates, train nothing")
    add("--redraw", action="store_true", help="table and plot.png of OUT/link.json")
    return parser


def _measure(arguments: argparse.Namespace) -> LinkRun:
    rates = [parse_rate(text) for text in (["0.2gbit"] if arguments.smoke else arguments.rates)]
    variants = tuple(dict.fromkeys(arguments.variants))
    check_variants(variants)
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"rounds = {arguments.rounds}: must be 1 or more")
    run = _empty_run(arguments)
    _check_memory(run.workload, len(variants), run.hosts)
    out: Path = arguments.out
    begun = time.perf_counter()
    with hosts(run.hosts, None, run.delay_ms) as made:
        run = replace(run, congestion_control=made.congestion_control())
        for index, rate in enumerate(rates):
            achieved = _set_rate(made, rate, must_hold=not arguments.smoke)
            job = _job(arguments, run.workload, variants, rates, index)
            meanwhile = watch_neighbours()
            ranks = run_job(job, made, os.environ)
            result = rate_result(rate, achieved, ranks, meanwhile())
            run = _with(replace(run, parameters=ranks[0].parameters), result, time.perf_counter() - begun)
            write_record(run, out / "link.json")
    return run


def _check_memory(workload: Workload, variants: int, count: int) -> None:
    """Refuse a run that would push this machine into waiting for memory, which steps would be timed with.

    Raises:
        Unavailable: names what is needed and what is there.
        ValueError: the model's sizes do not fit each other.
    """
    needed, available = count * workload.host_bytes(variants, count), available_bytes()
    if needed > available:
        raise Unavailable(
            f"{count} hosts with {variants} variants need about {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB are free: use fewer --variants, --depth or --hosts"
        )


def _empty_run(arguments: argparse.Namespace) -> LinkRun:
    place = measured_on("cpu", "benchmarks.link", sys.argv[1:])
    place["versions"] |= {"kernel": platform.release()}
    chosen = replace(Workload(), width=arguments.width, depth=arguments.depth, batch=arguments.batch)
    chosen = replace(chosen, heads=max(1, arguments.width // 64))
    return LinkRun(
        schema_version=SCHEMA_VERSION,
        hosts=2 if arguments.smoke else arguments.hosts,
        delay_ms=arguments.delay_ms,
        congestion_control="",
        workload=TINY if arguments.smoke else chosen,
        parameters=0,
        rates=(),
        fits={},
        environment=dict(ENVIRONMENT),
        load_average=os.getloadavg()[0],
        seconds=0.0,
        **place,
    )


def _job(
    arguments: argparse.Namespace,
    workload: Workload,
    variants: tuple[str, ...],
    rates: Sequence[float | None],
    index: int,
) -> Job:
    rate = rates[index]
    fixed = 2 if arguments.smoke else arguments.rounds
    return Job(
        workload=workload,
        variants=variants,
        least_rounds=fixed or 3,
        most_rounds=fixed or 9,
        seconds=arguments.seconds,
        sampled=rate == max(rates, key=lambda r: float("inf") if r is None else r),
        profile=arguments.profile,
        out=str(arguments.out.resolve() / rate_name(rate).replace(" Gbit/s", "gbit")),
    )


def _set_rate(made: Hosts, rate: float | None, must_hold: bool = True) -> tuple[float, ...]:
    """Limit the hosts and see that the limit holds; the machine may be busy, so up to three times.

    Raises:
        Unavailable: a stream is off by more than 5 %, and it must hold: what is timed would mean nothing.
    """
    made.set_rate(rate)
    for _ in range(3):
        achieved = made.achieved()
        log.info("%s: achieved %s Gbit/s", rate_name(rate), ", ".join(f"{a / 1e9:.3f}" for a in achieved))
        if rate is None or all(abs(a / rate - 1) <= 0.05 for a in achieved):
            return achieved
    if not must_hold:
        log.warning("%s does not hold: times of this run mean nothing", rate_name(rate))
        return achieved
    raise Unavailable(
        f"rate = {rate_name(rate)}: a stream has {min(achieved) / 1e9:.3f} Gbit/s, more than 5 % off; use a "
        f"lower rate, or stop what else runs here"
    )


def _with(run: LinkRun, result: RateResult, seconds: float) -> LinkRun:
    """The run with one rate more, and lines fitted anew; auto, which is another variant at each, has none."""
    rates = (*run.rates, result)
    fits = {name: fit_line(step_times(rates, name)) for name in result.variants if name != "auto"}
    known = {name: fit for name, fit in fits.items() if fit is not None}
    return replace(run, rates=rates, fits=with_break_evens(known, BASELINES), seconds=seconds)


def _check(arguments: argparse.Namespace) -> int:
    rates = [parse_rate(text) for text in arguments.rates]
    with hosts(arguments.hosts, None, arguments.delay_ms) as made:
        for rate in rates:
            _set_rate(made, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
