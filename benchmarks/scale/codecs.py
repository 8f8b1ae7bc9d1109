"""What codecs cost a GPU: bytes through its memory, over the rate at which they move them.

Bytes are those of `dtrain.kernels.quantize`, call by call as `dtrain.comm` makes them, for one unit. Rates
are measured ones of `python -m benchmarks.fused` where its file is given, else a share of the memory's rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.result import Result
from benchmarks.scale.cluster import Cluster
from benchmarks.sweep.plan import OURS
from benchmarks.sweep.run import read_sweep
from dtrain.comm.codec import Codec, Quantised
from dtrain.comm.config import Scheme
from dtrain.kernels import quantize
from dtrain.kernels.payload import Format, payload_bytes

__all__ = ["CodecRates", "Moved", "gather_moved", "kept_gather_moved", "measured_rates", "reduce_moved"]

_WORK, _SUM, _COMPUTE = 4, 4, 2  # bytes of masters and rows of gradients, of sums, of gathered weights
_KINDS = ("encode", "feedback", "decode_sum", "decode_add")


@dataclass(frozen=True)
class Moved:
    """Bytes by the kind of pass that moves them."""

    encode: float = 0.0
    feedback: float = 0.0
    decode_sum: float = 0.0
    decode_add: float = 0.0
    copy: float = 0.0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class CodecRates:
    """Bytes a second of each kind of pass.

    Args:
        by_kind: of those that are measured.
        assumed: of all others.
        said: where they come from, for people.
    """

    by_kind: Mapping[str, float]
    assumed: float
    said: str

    def seconds(self, moved: Moved) -> float:
        seconds = (value / self.by_kind.get(name, self.assumed) for name, value in vars(moved).items())
        return float(sum(seconds))


def measured_rates(path: Path, assumed: float) -> CodecRates:
    """Rates of our kernels in a sweep of `benchmarks.fused`, the mean over formats of each kind of pass.

    Raises:
        ValueError: not such a file, or none of it was measured on a GPU behind green gates.
    """
    found: dict[str, list[float]] = {}
    devices = set()
    for result in read_sweep(path).results:
        rate = _rate(result)
        kind = next((k for k in _KINDS if result.case.startswith(f"quantize_{k}_")), None)
        if kind and rate:
            found.setdefault(kind, []).append(rate)
            devices.add(result.device.name)
    if not found:
        raise ValueError(f"codecs = {path}: has no quantisation that was measured on a GPU with green gates")
    rates = {kind: fmean(values) for kind, values in found.items()}
    words = ", ".join(f"{kind} {rate / 1e9:.0f} GB/s" for kind, rate in rates.items())
    return CodecRates(rates, assumed, f"measured on {', '.join(sorted(devices))} ({words})")


def _rate(result: Result) -> float | None:
    measured = result.contestants.get(OURS, {}).get("bandwidth")
    trusted = measured is not None and result.device.kind == "cuda" and result.passed
    return 1e9 * measured.value if measured is not None and trusted else None


def gather_moved(scheme: Scheme, cluster: Cluster, n: int) -> Moved:
    """Of a gather that sends: a rank's n numbers are encoded, those of all ranks decoded."""
    codec, w = scheme.weights, cluster.gpus
    if not isinstance(codec, Quantised):
        return Moved()  # FSDP2 casts in any case
    masters = Moved(copy=2 * _WORK * n)
    if not scheme.delta:
        encoded = quantize.encode_bytes(n, codec.format, _WORK)
        decoded = w * quantize.decode_sum_bytes(n, codec.format, out=_COMPUTE)
        return masters + Moved(encode=encoded, decode_sum=decoded)
    encoded = quantize.encode_bytes(n, codec.format, _WORK, minus=_COMPUTE)
    added = w * quantize.decode_add_bytes(n, codec.format, into=_COMPUTE)
    return masters + Moved(encode=encoded, decode_add=added) + kept_gather_moved(scheme, cluster, n)


def kept_gather_moved(scheme: Scheme, cluster: Cluster, n: int) -> Moved:
    """Of a gather that sends nothing: the bf16 reference is copied."""
    return Moved(copy=2 * _COMPUTE * n * cluster.gpus)


def reduce_moved(scheme: Scheme, cluster: Cluster, n: int, two_levels: bool) -> Moved:
    """Of a sum in which this rank keeps n numbers."""
    w, p, nodes = cluster.gpus, cluster.places, cluster.nodes
    feedback = scheme.feedback != "none"
    if not two_levels:
        return _encoded(scheme.gradients, n, w, feedback) + _summed(scheme.gradients, n, w)
    ordered = Moved(copy=2 * w * scheme.inside.wire_bytes(n))  # messages of a rank lie one behind another
    inside = _encoded(scheme.inside, n, w, False) + ordered + _times(_summed(scheme.inside, n, p), nodes)
    return inside + _encoded(scheme.gradients, n, nodes, feedback) + _summed(scheme.gradients, n, nodes)


def _encoded(codec: Codec, n: int, rows: int, feedback: bool) -> Moved:
    if not isinstance(codec, Quantised):
        return Moved(copy=rows * (_WORK * n + codec.wire_bytes(n)))
    moved = rows * quantize.encode_bytes(n, codec.format, _WORK)
    if not feedback:
        return Moved(encode=moved)
    residual = payload_bytes(n, Format("int8", codec.format.block))  # read and written
    return Moved(feedback=moved + 2 * rows * residual)


def _summed(codec: Codec, n: int, k: int) -> Moved:
    if isinstance(codec, Quantised):
        return Moved(decode_sum=quantize.decode_sum_bytes(n, codec.format, k, _SUM))
    # The first is copied, the others are added one by one, and the sum is divided.
    return Moved(copy=k * codec.wire_bytes(n) + (2 * k + 1) * _SUM * n)


def _times(moved: Moved, count: int) -> Moved:
    return Moved(**{name: count * value for name, value in vars(moved).items()})
