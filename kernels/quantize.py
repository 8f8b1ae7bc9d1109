"""Quantisation as operators of PyTorch: block-scaled int8, fp8 and int4 for what travels between ranks.

    encode              payload = Q(H(x - minus) + residual), and the new residual, in one pass
    decode, decode_sum  H(Σ D(payload)) / k, summed in fp32 in the order of the ranks
    decode_sum_encode   the same, encoded again for the next hop, with error feedback as well
    decode_add          into += H(D(payload))

Formats and layout are in `payload`; `quantize_reference` is the definition. A GPU has the kernels of
`quantize_kernels`; a CPU loops that a compiler makes of `quantize_cpu.cpp`, where there is one. All of it
is bound by memory. Bytes moved by a row, for n elements and p = `payload_bytes(n, format)`:

    encode              n·(x + minus + 2·residual) + p
    decode_sum          k·p + n·out
    decode_sum_encode   k·p_in + 2·n·residual + p_out
    decode_add          p + 2n·into

Collectives write a payload for each rank they send to, and read one of each that they hear from: every
function takes rows, each a tensor of its own, m of them in one launch. Rows of payloads may lie in a larger
buffer, at multiples of 16 bytes; all else is contiguous.

Every rank that decodes a payload gets the same bits; a rank that keeps its own tensor instead drifts from the
others. Nothing here is differentiable: tensors that ask for a gradient are taken as they are.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import quantize_cpu, quantize_launch, quantize_reference
from dtrain.kernels.op import Operator
from dtrain.kernels.payload import ALIGNMENT, Bits, Format, format_of, payload_bytes, residual_numel
from dtrain.kernels.quantize_checks import (
    check_divide,
    check_payload,
    check_payloads,
    check_residual,
    check_stream,
    check_tensor,
    lead_of,
)
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = [
    "Format", "payload_bytes", "residual_numel",
    "encode", "decode", "decode_sum", "decode_sum_encode", "decode_add",
    "encode_bytes", "decode_sum_bytes", "decode_sum_encode_bytes", "decode_add_bytes",
]  # fmt: skip


_log = logging.getLogger(__name__)

_PASSES = "quantisation takes several passes"
_SERVERS: dict[str, Any] = {
    "triton": quantize_launch,
    "compiled": quantize_cpu,
    "reference": quantize_reference,
}


def encode_bytes(n: int, format: Format, x: int = 4, minus: int = 0, residual: int = 0) -> int:
    """Bytes that `encode` moves; x, minus and residual are bytes of an element, 0 for what is absent."""
    return n * (x + minus) + 2 * residual * residual_numel(n, format) + payload_bytes(n, format)


def decode_sum_bytes(n: int, format: Format, k: int = 1, out: int = 4) -> int:
    """Bytes that `decode_sum` of k payloads moves, `decode` with one; out is bytes of an element."""
    return k * payload_bytes(n, format) + n * out


def decode_sum_encode_bytes(n: int, format_in: Format, format_out: Format, k: int, residual: int = 0) -> int:
    """Bytes that `decode_sum_encode` of k payloads moves; residual is bytes of an element."""
    kept = 2 * residual * residual_numel(n, format_out)
    return k * payload_bytes(n, format_in) + kept + payload_bytes(n, format_out)


def decode_add_bytes(n: int, format: Format, into: int = 4) -> int:
    """Bytes that `decode_add` moves; into is bytes of an element."""
    return payload_bytes(n, format) + 2 * n * into


def _aligned(**tensors: Tensor | None) -> None:
    """Of operators, as torch.compile knows no addresses. Payloads are bytes."""
    for name, x in tensors.items():
        if x is not None and x.dtype == torch.uint8 and x.data_ptr() % ALIGNMENT:
            raise ValueError(f"{name} begins at address {x.data_ptr()}: must be a multiple of {ALIGNMENT}")


def _written(*tensors: Tensor | None) -> None:
    """Tell autograd, which would otherwise not see what a kernel wrote."""
    for x in tensors:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _encode_any(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None,
    bits: Bits, block: int, rotation: int, seed: int | None, first: int, server: str,
) -> None:  # fmt: skip
    _aligned(out=payload, residual=residual)
    _SERVERS[server].encode(x, payload, minus, residual, format_of(bits, block, rotation), seed, first)
    _written(payload, residual)


def _decode_sum_any(
    payloads: Tensor, out: Tensor, bits: Bits, block: int, rotation: int, divide: float, server: str
) -> None:
    _aligned(payloads=payloads)
    _SERVERS[server].decode_sum(payloads, out, divide, format_of(bits, block, rotation))
    _written(out)


def _decode_add_any(
    payloads: Tensor, into: Tensor, bits: Bits, block: int, rotation: int, server: str
) -> None:
    _aligned(payload=payloads)
    _SERVERS[server].decode_add(payloads, into, format_of(bits, block, rotation))
    _written(into)


def _decode_sum_encode_any(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, n: int, bits_in: Bits, rotation_in: int,
    bits: Bits, block: int, rotation: int, divide: float, seed: int | None, first: int, server: str,
) -> None:  # fmt: skip
    _aligned(payloads=payloads, out=payload, residual=residual)
    formats = format_of(bits_in, block, rotation_in), format_of(bits, block, rotation)
    _SERVERS[server].decode_sum_encode(payloads, payload, residual, n, divide, *formats, seed, first)
    _written(payload, residual)


def _operator(schema: str, run: Callable[..., None]) -> Operator:
    return Operator(f"dtrain::{schema} -> ()", cpu=run, cuda=run, fake=lambda *args: None)


_FORMAT = "str bits, int block, int rotation"

_encode = _operator(
    "quantize_encode(Tensor x, Tensor(a!) payload, Tensor? minus, Tensor(b!)? residual, "
    f"{_FORMAT}, int? seed, int first, str server)",
    _encode_any,
)
_decode_sum = _operator(
    f"quantize_decode_sum(Tensor payloads, Tensor(a!) out, {_FORMAT}, float divide, str server)",
    _decode_sum_any,
)
_decode_add = _operator(
    f"quantize_decode_add(Tensor payloads, Tensor(a!) into, {_FORMAT}, str server)", _decode_add_any
)
_decode_sum_encode = _operator(
    "quantize_decode_sum_encode(Tensor payloads, Tensor(a!) payload, Tensor(b!)? residual, int n, "
    f"str bits_in, int rotation_in, {_FORMAT}, float divide, int? seed, int first, str server)",
    _decode_sum_encode_any,
)


def encode(
    x: Tensor,
    format: Format,
    *,
    out: Tensor | None = None,
    seed: int | None = None,
    first: int = 0,
    minus: Tensor | None = None,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Quantise a tensor, or each of m rows: the payload of v = H(x - minus) + residual.

    Args:
        x: (n,) or (m, n) fp32, bf16 or fp16.
        format: of the payload.
        out: (`payload_bytes(n, format)`,) or (m, ...) uint8 to write to, at multiples of 16 bytes; None makes
            one.
        seed: in [0, 2^63), rounds by chance; None rounds to the nearest code.
        first: index of element 0 of x in the stream of `seed`, a multiple of the block: a tensor that is cut
            at multiples of the block gives the payloads of the whole. Each row goes on where the last block
            of the one before it ends.
        minus: fp32, bf16 or fp16 of x's shape, taken off first.
        residual: the error of the call before, which is added, and replaced by this one's, v less what the
            payload stands for (before H is taken back). (`residual_numel(n, format)`,) fp32, bf16 or fp16, or
            uint8: a payload of n elements in `Format("int8", format.block)`; (m, ...) for rows. Begin with
            zeros, which a payload of zero bytes stands for. It is zero where a block is not finite: NaN ends
            with its step.
        backend: "triton" is the kernel, "reference" PyTorch. "auto" is the kernel on a GPU, and on a CPU what
            was compiled for it.
    Returns: the payload; `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    lead, n = lead_of("x", x), x.shape[-1]
    check_tensor("x", x, (*lead, n), x.device)
    if out is None:
        out = torch.empty(*lead, payload_bytes(n, format), dtype=torch.uint8, device=x.device)
    check_payload("out", out, lead, n, format, x.device)
    if minus is not None:
        check_tensor("minus", minus, (*lead, n), x.device)
    check_residual(residual, lead, n, format, x.device)
    check_stream(seed, first, format)
    if x.numel():
        _encode(
            _two(x), _two(out), _two_or_none(minus), _two_or_none(residual),
            format.bits, format.block, format.rotation, seed, first, _server(backend, x.device),
        )  # fmt: skip
    return out


def decode(
    payload: Tensor,
    n: int,
    format: Format,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """What a payload (`payload_bytes(n, format)`,) stands for, or each of (m, ...): see `decode_sum`."""
    check_payload("payload", payload, lead_of("payload", payload), n, format, payload.device)
    return decode_sum(payload[None], n, format, dtype=dtype, out=out, backend=backend)


def decode_sum(
    payloads: Tensor,
    n: int,
    format: Format,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    divide: float = 1,
    backend: Backend = "auto",
) -> Tensor:
    """The sum of what payloads stand for, in fp32 in their order, times 1/divide, rounded once.

    Args:
        payloads: (k, `payload_bytes(n, format)`) uint8, k at least 1, or (k, m, ...) for m sums; all at
            multiples of 16 bytes.
        n: elements of a sum.
        dtype: of the result, fp32, bf16 or fp16; fp32 if neither it nor `out` is given.
        out: (n,) or (m, n) to write to; None makes one.
        divide: what sums are divided by, such as the number of ranks.
    Returns: (n,) or (m, n); `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    lead = check_payloads(payloads, n, format)
    check_divide(divide)
    if out is None:
        out = torch.empty(*lead, n, dtype=dtype or torch.float32, device=payloads.device)
    elif dtype not in (None, out.dtype):
        raise ValueError(f"dtype = {dtype}: out has {out.dtype}; give one of the two")
    check_tensor("out", out, (*lead, n), payloads.device)
    if out.numel():
        _decode_sum(
            _three(payloads), _two(out), format.bits, format.block, format.rotation, float(divide),
            _server(backend, out.device),
        )  # fmt: skip
    return out


def decode_sum_encode(
    payloads: Tensor,
    n: int,
    format_in: Format,
    format_out: Format,
    *,
    out: Tensor | None = None,
    divide: float = 1,
    seed: int | None = None,
    first: int = 0,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`encode` of `decode_sum`, without the sum in memory; one rotation undoes an equal one, neither is done.

    Args:
        payloads: (k, `payload_bytes(n, format_in)`) or (k, m, ...) uint8, see `decode_sum`.
        format_in, format_out: with the same block.
        out, seed, first, residual: see `encode`, with `format_out`.
    Returns: (`payload_bytes(n, format_out)`,) or (m, ...) uint8; `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    lead = check_payloads(payloads, n, format_in)
    if format_in.block != format_out.block:
        raise ValueError(f"block = {format_out.block} of format_out: must be {format_in.block}, format_in's")
    check_divide(divide)
    check_stream(seed, first, format_out)
    if out is None:
        out = torch.empty(*lead, payload_bytes(n, format_out), dtype=torch.uint8, device=payloads.device)
    check_payload("out", out, lead, n, format_out, payloads.device)
    check_residual(residual, lead, n, format_out, payloads.device)
    if out.numel():
        _decode_sum_encode(
            _three(payloads), _two(out), _two_or_none(residual), n, format_in.bits, format_in.rotation,
            format_out.bits, format_out.block, format_out.rotation, float(divide), seed, first,
            _server(backend, out.device),
        )  # fmt: skip
    return out


def decode_add(payload: Tensor, n: int, format: Format, into: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Add what a payload stands for to `into`, in place: in fp32 with one rounding to its dtype.

    Args:
        payload: (`payload_bytes(n, format)`,) or (m, ...) uint8.
        into: (n,) or (m, n) fp32, bf16 or fp16.
    Returns: `into`.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    lead = lead_of("payload", payload)
    check_payload("payload", payload, lead, n, format, payload.device)
    check_tensor("into", into, (*lead, n), payload.device)
    if into.numel():
        _decode_add(
            _two(payload), _two(into), format.bits, format.block, format.rotation,
            _server(backend, into.device),
        )  # fmt: skip
    return into


def _two(x: Tensor) -> Tensor:
    """(n,) as one row; without its graph."""
    x = x.detach()
    return x if x.dim() == 2 else x[None]


def _two_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _two(x)


def _three(payloads: Tensor) -> Tensor:
    """(k, bytes) as (k, 1, bytes)."""
    return payloads if payloads.dim() == 3 else payloads[:, None]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _server(backend: Backend, device: torch.device) -> str:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    if kernels_serve(backend, device, quantize_launch.refusal(device), _PASSES):
        return "triton"
    compiled = backend == "auto" and device.type == "cpu" and _compiled()
    return "compiled" if compiled else "reference"


@functools.cache
def _compiled() -> bool:
    refusal = quantize_cpu.refusal()
    if refusal:
        _log.warning("%s: %s", _PASSES, refusal)
    return not refusal
