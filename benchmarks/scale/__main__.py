"""`python -m benchmarks.scale`: a MODEL of what compressed collectives gain on 8 to 1024 GPUs.

Nothing here is measured on many GPUs. The time of a step is computed from bytes, which are those of the
codecs' own messages, and from rates and latencies that are assumed and printed with the result. What is
measured: `python -m benchmarks.link` (ranks over a limited network), `python -m benchmarks.scale.overlap`
(what a GPU does beside compute).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import origin
from benchmarks.record import write_record
from benchmarks.scale.cluster import Cluster
from benchmarks.scale.codecs import CodecRates, measured_rates
from benchmarks.scale.plot import plot
from benchmarks.scale.result import SCHEMA_VERSION, ScaleModel, points
from benchmarks.scale.step import Workload
from benchmarks.scale.table import table
from benchmarks.scale.variants import BASELINE

__all__ = ["main"]

_EXPLAINED = """\
how a step is modelled:
  U equal units are gathered, computed with and summed one after another. A unit's gather runs beside the
  compute of the unit before, in the backward beside the sum of the unit after; what takes longer than that
  compute is exposed, and so are the first gather of each pass and the last sum. Codecs are counted in full.

      step = compute + codecs + exposed wire

  Gathers, and FSDP2's own sums, run in rings: a node's ports share what enters it. Compressed sums are
  all-to-alls. In one level each rank's messages leave the node by themselves, which costs a port as many
  times a ring's bytes as a node has GPUs; in two levels (dtrain's own choice where nodes have several
  GPUs) gradients of a node are summed first.

variants:
  fsdp2-fp32, fsdp2-bf16              FSDP2's own collectives, gradients summed in fp32 or bf16
  bf16, int8, int8-int4, int4-delta   presets of dtrain.comm.CommConfig, summed in one level or in two

examples:
  python -m benchmarks.scale                                       a model of 2 G parameters
  python -m benchmarks.scale --codecs build/fused/fused.json       codecs as `benchmarks.fused` measured them
  python -m benchmarks.scale --parameters 5e8 --units 29 --tokens 16512 --gbit 10 25
  python -m benchmarks.scale --per-node 1                          a GPU a machine: rings have no advantage

reading it:
  gain     step of fsdp2-bf16 over the variant's; over 1 is faster. Where it is 1.0, compute hides the wire
  codecs   below 1 in a column of fast links is what codecs cost without paying
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 where an argument does not fit."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    try:
        model = _model(arguments, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_record(model, out / "scale.json")
    plot(model, out / "plot.png")
    print(table(model))
    return 0


def _parser() -> argparse.ArgumentParser:
    work, cluster = Workload(), Cluster(1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        epilog=_EXPLAINED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parameters", type=float, default=work.parameters, metavar="N", help="of the model [2e9]")
    add("--units", type=int, default=work.units, metavar="U", help=f"gathered one by one [{work.units}]")
    add("--tokens", type=int, default=work.tokens, metavar="T", help=f"of a GPU and step [{work.tokens}]")
    add("--tflops", type=float, default=work.flops / 1e12, metavar="X",
        help="TFLOP/s that a GPU reaches, of 989 of an H100 in bf16 [400]")  # fmt: skip
    add("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024], metavar="W",
        help="ranks [8 16 32 64 128 256 512 1024]")  # fmt: skip
    add("--gbit", type=float, nargs="+", default=[25, 50, 100, 400], metavar="R",
        help="Gbit/s of each GPU's port to other nodes, as reached [25 50 100 400]")  # fmt: skip
    add("--per-node", type=int, default=cluster.per_node, metavar="P", help="GPUs of a node [8]")
    add("--link-gbyte", type=float, default=cluster.link_rate / 1e9, metavar="X",
        help="GB/s that a GPU sends in its node, of 450 of NVLink 4 [350]")  # fmt: skip
    add("--codecs", type=Path, metavar="FILE", help="fused.json of a GPU: rates of the codecs as measured")
    add("--hbm-tbyte", type=float, default=3.35, metavar="X", help="TB/s of a GPU's memory, an H100's [3.35]")
    add("--codec-share", type=float, default=0.6, metavar="X",
        help="of that, what codecs reach where nothing was measured [0.6]")  # fmt: skip
    for name, what in _LATENCIES.items():
        micros = 1e6 * getattr(cluster, f"{name}_s")
        add(
            f"--{name.replace('_', '-')}-us",
            type=float,
            default=micros,
            metavar="X",
            help=f"{what} [{micros:g}]",
        )
    add("--out", type=Path, default=Path("build/scale"), metavar="DIR",
        help="for scale.json and plot.png [build/scale]")  # fmt: skip
    return parser


_LATENCIES = {
    "collective": "µs of a collective besides its bytes",
    "port_hop": "µs of each hop of a ring between nodes",
    "link_hop": "µs of each hop of a ring within a node",
    "message": "µs of each message of an all-to-all that leaves the node",
}


def _model(arguments: argparse.Namespace, argv: Sequence[str]) -> ScaleModel:
    workload = Workload(int(arguments.parameters), arguments.units, arguments.tokens, 1e12 * arguments.tflops)
    cluster = Cluster(
        gpus=1,
        per_node=arguments.per_node,
        link_rate=1e9 * arguments.link_gbyte,
        **{f"{name}_s": 1e-6 * getattr(arguments, f"{name}_us") for name in _LATENCIES},
    )
    clusters = [replace(cluster, gpus=n, port_rate=r / 8e-9) for r in arguments.gbit for n in arguments.gpus]
    rates = _codec_rates(arguments)
    return ScaleModel(
        kind="model",
        schema_version=SCHEMA_VERSION,
        baseline=BASELINE,
        assumptions=tuple(_assumptions(workload, cluster, rates)),
        points=tuple(points(workload, clusters, rates)),
        **origin("benchmarks.scale", argv),
    )


def _codec_rates(arguments: argparse.Namespace) -> CodecRates:
    if not 0 < arguments.codec_share <= 1 or arguments.hbm_tbyte <= 0:
        raise ValueError(
            f"codec-share = {arguments.codec_share}, hbm-tbyte = {arguments.hbm_tbyte}: the share must be "
            "above 0 and at most 1, the rate above 0"
        )
    assumed = arguments.codec_share * arguments.hbm_tbyte * 1e12
    said = f"assumed: {arguments.codec_share:g} of {arguments.hbm_tbyte:g} TB/s"
    if arguments.codecs is None:
        return CodecRates({}, assumed, said)
    if not arguments.codecs.exists():
        raise ValueError(f"codecs = {arguments.codecs}: no such file; benchmarks.fused writes it on a GPU")
    rates = measured_rates(arguments.codecs, assumed)
    return replace(rates, said=f"{rates.said}; other passes {said}")


def _assumptions(workload: Workload, cluster: Cluster, rates: CodecRates) -> Iterator[str]:
    compute_ms = 3e3 * workload.forward_s * workload.units
    yield (
        f"{workload.parameters / 1e9:g} G parameters in {workload.units} equal units, {workload.tokens:,} "
        f"tokens a GPU and step, {workload.flops / 1e12:g} TFLOP/s a GPU: compute {compute_ms:.0f} ms"
    )
    yield "6 FLOPs a parameter and token: no attention products, no recomputation, no optimizer"
    yield (
        f"nodes of {cluster.per_node}; {cluster.link_rate / 1e9:g} GB/s a GPU inside, ports at the rates "
        "of the tables"
    )
    yield "all parameters compressed, sharded over all GPUs, gathered for forward and backward, summed once"
    yield (
        f"{1e6 * cluster.collective_s:g} µs a collective; a hop of a ring {1e6 * cluster.port_hop_s:g} µs "
        f"between nodes, {1e6 * cluster.link_hop_s:g} µs inside; {1e6 * cluster.message_s:g} µs a message of "
        "an all-to-all between nodes"
    )
    yield f"codecs, by the bytes that they move: {rates.said}; none of their time counts as hidden"
    yield (
        "a unit's collectives hide behind its neighbour's compute, the first gather of a pass and the last "
        "sum behind nothing; a gather and a sum share the wire; no other traffic, no slow rank"
    )


if __name__ == "__main__":
    sys.exit(main())
