"""Quantisation as operators of PyTorch: block-scaled int8, fp8 and int4 for what travels between ranks.

    encode              payload = Q(H(x - minus) + residual), and the new residual, in one pass
    decode, decode_sum  H(Σ D(payload)) / k, summed in fp32 in the order of the ranks
    decode_sum_encode   the same, encoded again for the next hop
    decode_add          into += H(D(payload))

Formats and layout are in `payload`; `quantize_reference` is the definition, and what runs on a CPU. All of it
is bound by memory. Bytes moved, for n elements and p = `payload_bytes(n, format)`:

    encode              n·(x + minus + 2·residual) + p
    decode_sum          k·p + n·out
    decode_sum_encode   k·p_in + p_out
    decode_add          p + 2n·into

Every rank that decodes a payload gets the same bits; a rank that keeps its own tensor instead drifts from the
others. Nothing here is differentiable: tensors that ask for a gradient are taken as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.kernels import quantize_launch as kernels
from dtrain.kernels import quantize_reference as reference
from dtrain.kernels.op import Operator
from dtrain.kernels.payload import ALIGNMENT, Bits, Format, format_of, payload_bytes, residual_numel
from dtrain.kernels.serving import Backend, kernels_serve

__all__ = [
    "Format", "payload_bytes", "residual_numel",
    "encode", "decode", "decode_sum", "decode_sum_encode", "decode_add",
    "encode_bytes", "decode_sum_bytes", "decode_sum_encode_bytes", "decode_add_bytes",
]  # fmt: skip

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode_bytes(n: int, format: Format, x: int = 4, minus: int = 0, residual: int = 0) -> int:
    """Bytes that `encode` moves; x, minus and residual are bytes of an element, 0 for what is absent."""
    return n * (x + minus) + 2 * residual * residual_numel(n, format) + payload_bytes(n, format)


def decode_sum_bytes(n: int, format: Format, k: int = 1, out: int = 4) -> int:
    """Bytes that `decode_sum` of k payloads moves, `decode` with one; out is bytes of an element."""
    return k * payload_bytes(n, format) + n * out


def decode_sum_encode_bytes(n: int, format_in: Format, format_out: Format, k: int) -> int:
    """Bytes that `decode_sum_encode` of k payloads moves."""
    return k * payload_bytes(n, format_in) + payload_bytes(n, format_out)


def decode_add_bytes(n: int, format: Format, into: int = 4) -> int:
    """Bytes that `decode_add` moves; into is bytes of an element."""
    return payload_bytes(n, format) + 2 * n * into


def _aligned(**payloads: Tensor) -> None:
    """Of operators, as torch.compile knows no addresses."""
    for name, x in payloads.items():
        if x.data_ptr() % ALIGNMENT:
            raise ValueError(f"{name} begins at address {x.data_ptr()}: must be a multiple of {ALIGNMENT}")


def _written(*tensors: Tensor | None) -> None:
    """Tell autograd, which would otherwise not see what a kernel wrote."""
    for x in tensors:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _encode_any(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None,
    bits: Bits, block: int, rotation: int, seed: int | None, first: int, kernel: bool,
) -> None:  # fmt: skip
    _aligned(out=payload, **({} if residual is None else {"residual": residual}))
    run = kernels.encode if kernel else reference.encode
    run(x, payload, minus, residual, format_of(bits, block, rotation), seed, first)
    _written(payload, residual)


def _decode_sum_any(
    payloads: Tensor, out: Tensor, bits: Bits, block: int, rotation: int, divide: float, kernel: bool
) -> None:
    _aligned(payloads=payloads)
    run = kernels.decode if kernel else reference.decode_sum
    run(payloads, out, divide, format_of(bits, block, rotation))
    _written(out)


def _decode_add_any(
    payload: Tensor, into: Tensor, bits: Bits, block: int, rotation: int, kernel: bool
) -> None:
    _aligned(payload=payload)
    format = format_of(bits, block, rotation)
    if kernel:
        kernels.decode(payload[None], into, 1, format, add=True)
    else:
        reference.decode_add(payload, into, format)
    _written(into)


def _decode_sum_encode_any(
    payloads: Tensor, payload: Tensor, n: int, bits_in: Bits, rotation_in: int,
    bits: Bits, block: int, rotation: int, divide: float, seed: int | None, first: int, kernel: bool,
) -> None:  # fmt: skip
    _aligned(payloads=payloads, out=payload)
    run = kernels.decode_sum_encode if kernel else reference.decode_sum_encode
    format_in, format_out = format_of(bits_in, block, rotation_in), format_of(bits, block, rotation)
    run(payloads, payload, n, divide, format_in, format_out, seed, first)
    _written(payload)


def _operator(schema: str, run: Callable[..., None]) -> Operator:
    return Operator(f"dtrain::{schema} -> ()", cpu=run, cuda=run, fake=lambda *args: None)


_FORMAT = "str bits, int block, int rotation"

_encode = _operator(
    "quantize_encode(Tensor x, Tensor(a!) payload, Tensor? minus, Tensor(b!)? residual, "
    f"{_FORMAT}, int? seed, int first, bool kernel)",
    _encode_any,
)
_decode_sum = _operator(
    f"quantize_decode_sum(Tensor payloads, Tensor(a!) out, {_FORMAT}, float divide, bool kernel)",
    _decode_sum_any,
)
_decode_add = _operator(
    f"quantize_decode_add(Tensor payload, Tensor(a!) into, {_FORMAT}, bool kernel)", _decode_add_any
)
_decode_sum_encode = _operator(
    "quantize_decode_sum_encode(Tensor payloads, Tensor(a!) payload, int n, str bits_in, int rotation_in, "
    f"{_FORMAT}, float divide, int? seed, int first, bool kernel)",
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
    """Quantise a tensor: the payload of v = H(x - minus) + residual.

    Args:
        x: (n,) fp32, bf16 or fp16.
        format: of the payload.
        out: (`payload_bytes(n, format)`,) uint8 to write to, at a multiple of 16 bytes; None makes one.
        seed: in [0, 2^63), rounds by chance; None rounds to the nearest code.
        first: index of element 0 of x in the stream of `seed`, a multiple of the block: a tensor that is cut
            at multiples of the block gives the payloads of the whole.
        minus: (n,) fp32, bf16 or fp16, taken off first.
        residual: the error of the call before, which is added, and replaced by this one's, v less what the
            payload stands for (before H is taken back). (`residual_numel(n, format)`,) fp32, bf16 or fp16, or
            uint8: a payload of n elements in `Format("int8", format.block)`. Begin with zeros, which a
            payload of zero bytes stands for. It is zero where a block is not finite: NaN ends with its step.
        backend: "triton" is the kernel, "reference" PyTorch. "auto" is the kernel on a GPU.
    Returns: the payload; `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    n = x.numel()
    _check_tensor("x", x, (n,), _DTYPES, x.device)
    if out is None:
        out = torch.empty(payload_bytes(n, format), dtype=torch.uint8, device=x.device)
    _check_payload("out", out, n, format, x.device)
    if minus is not None:
        _check_tensor("minus", minus, (n,), _DTYPES, x.device)
    if residual is not None and residual.dtype == torch.uint8:
        _check_payload("residual", residual, n, Format("int8", format.block), x.device)
    elif residual is not None:
        _check_tensor("residual", residual, (residual_numel(n, format),), _DTYPES, x.device)
    _check_stream(seed, first, format)
    if n:
        _encode(
            x.detach(), out, _plain(minus), _plain(residual), format.bits, format.block, format.rotation,
            seed, first, _fused(backend, x.device),
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
    """What a payload (`payload_bytes(n, format)`,) stands for, see `decode_sum`."""
    _check_payload("payload", payload, n, format, payload.device)
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
        payloads: (k, `payload_bytes(n, format)`) uint8, k at least 1; rows at multiples of 16 bytes.
        n: elements.
        dtype: of the result, fp32, bf16 or fp16; fp32 if neither it nor `out` is given.
        out: (n,) to write to; None makes one.
        divide: what the sum is divided by, such as the number of ranks.
    Returns: (n,); `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    _check_payloads("payloads", payloads, n, format)
    _check_divide(divide)
    if out is None:
        out = torch.empty(n, dtype=dtype or torch.float32, device=payloads.device)
    elif dtype not in (None, out.dtype):
        raise ValueError(f"dtype = {dtype}: out has {out.dtype}; give one of the two")
    _check_tensor("out", out, (n,), _DTYPES, payloads.device)
    if n:
        _decode_sum(
            payloads, out.detach(), format.bits, format.block, format.rotation, float(divide),
            _fused(backend, out.device),
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
    backend: Backend = "auto",
) -> Tensor:
    """`encode` of `decode_sum`, without the sum in memory; one rotation undoes an equal one, neither is done.

    Args:
        payloads: (k, `payload_bytes(n, format_in)`) uint8, see `decode_sum`.
        format_in, format_out: with the same block.
        out, seed, first: see `encode`.
    Returns: (`payload_bytes(n, format_out)`,) uint8; `out` where that is given.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    _check_payloads("payloads", payloads, n, format_in)
    if format_in.block != format_out.block:
        raise ValueError(f"block = {format_out.block} of format_out: must be {format_in.block}, format_in's")
    _check_divide(divide)
    _check_stream(seed, first, format_out)
    if out is None:
        out = torch.empty(payload_bytes(n, format_out), dtype=torch.uint8, device=payloads.device)
    _check_payload("out", out, n, format_out, payloads.device)
    if n:
        _decode_sum_encode(
            payloads, out, n, format_in.bits, format_in.rotation,
            format_out.bits, format_out.block, format_out.rotation, float(divide), seed, first,
            _fused(backend, out.device),
        )  # fmt: skip
    return out


def decode_add(payload: Tensor, n: int, format: Format, into: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Add what a payload stands for to `into` (n,), in place: in fp32 with one rounding to its dtype.

    Returns: `into`.
    Raises:
        ValueError: what is given does not fit, or the chosen backend cannot serve.
    """
    _check_payload("payload", payload, n, format, payload.device)
    _check_tensor("into", into, (n,), _DTYPES, payload.device)
    if n:
        _decode_add(
            payload, into.detach(), format.bits, format.block, format.rotation, _fused(backend, into.device)
        )
    return into


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if x.shape != shape or not x.is_contiguous():
        contiguous = "" if x.is_contiguous() else " and not contiguous"
        raise ValueError(f"{name} {tuple(x.shape)}{contiguous}: must be contiguous {shape}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}: must be one of {', '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}: must be on {device} as the others are")


def _check_payload(name: str, payload: Tensor, n: int, format: Format, device: torch.device) -> None:
    _check_tensor(name, payload, (payload_bytes(n, format),), (torch.uint8,), device)


def _check_payloads(name: str, payloads: Tensor, n: int, format: Format) -> None:
    size = payload_bytes(n, format)
    if payloads.dim() != 2 or len(payloads) < 1 or payloads.shape[1] != size:
        raise ValueError(f"{name} {tuple(payloads.shape)}: must be (k, {size}), k at least 1")
    if len(payloads) > 1 and (payloads.stride(0) % ALIGNMENT or payloads.stride(1) != 1):
        raise ValueError(f"{name} has strides {payloads.stride()}: rows must be {ALIGNMENT}·m bytes apart")
    _check_payload(f"{name}[0]", payloads[0], n, format, payloads.device)


def _check_stream(seed: int | None, first: int, format: Format) -> None:
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}: must be in [0, 2^63)")
    if first < 0 or first % format.block:
        raise ValueError(f"first = {first}: must be a multiple of the block, {format.block}")


def _check_divide(divide: float) -> None:
    if not divide > 0:
        raise ValueError(f"divide = {divide}: must be above 0")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fused(backend: Backend, device: torch.device) -> bool:
    # Asked while torch.compile traces, which cannot see through the log and the cache.
    return kernels_serve(backend, device, kernels.refusal(device), "quantisation takes several passes")
