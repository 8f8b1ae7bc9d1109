"""Rows: m tensors in one call are m calls, bit by bit, and the error feedback of the second hop."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import quantize_kernels, quantize_launch
from dtrain.kernels.payload import Format, parts, payload_bytes, residual_numel
from dtrain.kernels.quantize import decode, decode_add, decode_sum, decode_sum_encode, encode
from tests.kernels.attention_checks import DEVICE, needs_triton
from tests.kernels.test_quantize_kernels import BITS, assert_same_code_by_code, draw, make_residual

BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
SIZES = [1, 300, 4112]  # but for the last, rows begin anywhere
GAP = 48  # bytes between payloads


def rows_of(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(m * n, seed, dtype).view(m, n)


def residuals_of(m: int, n: int, format: Format, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    residual = 0.1 * rows_of(m, residual_numel(n, format), seed=7)
    if kind == "payload":
        return encode(residual[:, :n].contiguous(), Format("int8", format.block), backend="reference")
    return residual.to(getattr(torch, kind))


def with_gaps(*shape: int) -> tuple[Tensor, Tensor]:
    """A buffer, and payloads (*shape) in it."""
    buffer = torch.full((*shape[:-1], shape[-1] + GAP), 0xAB, dtype=torch.uint8, device=DEVICE)
    return buffer, buffer[..., : shape[-1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "float32", "payload"])
@pytest.mark.parametrize("format", [Format("int8"), Format("fp8", 64, 64), Format("int4", 128, 32)])
@pytest.mark.parametrize("n", SIZES)
def test_encoded_row_by_row(n: int, format: Format, kind: str, backend: Any) -> None:
    m, size, step = 3, payload_bytes(n, format), format.blocks(n) * format.block
    x, minus = rows_of(m, n), rows_of(m, n, 1, torch.float16)
    for seed in (None, 5):
        residual = residuals_of(m, n, format, kind)
        apart = None if residual is None else residual.clone()
        buffer, out = with_gaps(m, size)
        how = {"seed": seed, "backend": backend}
        assert (
            encode(x, format, out=out, minus=minus, residual=residual, first=2 * format.block, **how) is out
        )
        for i in range(m):
            kept = None if apart is None else apart[i]
            first = 2 * format.block + i * step
            # A tensor of its own, at its own alignment.
            wanted = encode(x[i].clone(), format, minus=minus[i].clone(), residual=kept, first=first, **how)
            assert out[i].equal(wanted)
        assert buffer[:, size:].eq(0xAB).all()
        assert residual is None or residual.equal(apart)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", [Format("int8"), Format("fp8", 64, 64), Format("int4", 128, 32)])
@pytest.mark.parametrize("n", SIZES)
def test_decoded_row_by_row(n: int, format: Format, dtype: torch.dtype, backend: Any) -> None:
    k, m = 2, 3
    _, payloads = with_gaps(k, m, payload_bytes(n, format))
    for i in range(k):
        encode(rows_of(m, n, i), format, out=payloads[i])
    for order in (payloads, payloads.transpose(0, 1)):  # either way round in memory
        found = decode_sum(order, n, format, dtype=dtype, divide=3, backend=backend)
        for i in range(len(found)):
            wanted = decode_sum(order[:, i].contiguous(), n, format, dtype=dtype, divide=3, backend=backend)
            assert found[i].equal(wanted)
    into = rows_of(m, n, 9, dtype)
    wanted_rows = [decode_add(payloads[1, i], n, format, into[i].clone(), backend=backend) for i in range(m)]
    assert decode_add(payloads[1], n, format, into, backend=backend) is into
    assert into.equal(torch.stack(wanted_rows))
    wanted_rows = [decode(payloads[1, i], n, format, dtype=dtype, backend=backend) for i in range(m)]
    assert decode(payloads[1], n, format, dtype=dtype, backend=backend).equal(torch.stack(wanted_rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "float32", "payload"])
@pytest.mark.parametrize("rotations", [(0, 0), (32, 32), (0, 32)])
@pytest.mark.parametrize("n", SIZES)
def test_summed_and_encoded_again_row_by_row(
    n: int, rotations: tuple[int, int], kind: str, backend: Any
) -> None:
    k, m = 2, 3
    format_in, format_out = Format("int8", 128, rotations[0]), Format("int4", 128, rotations[1])
    payloads = torch.stack([encode(rows_of(m, n, i), format_in) for i in range(k)])
    residual = residuals_of(m, n, format_out, kind)
    apart = None if residual is None else residual.clone()
    buffer, out = with_gaps(m, payload_bytes(n, format_out))
    how = {"divide": k, "seed": 8, "backend": backend}
    decode_sum_encode(payloads, n, format_in, format_out, out=out, residual=residual, first=128, **how)
    for i in range(m):
        kept = None if apart is None else apart[i]
        first = 128 + i * format_out.blocks(n) * 128
        wanted = decode_sum_encode(
            payloads[:, i], n, format_in, format_out, residual=kept, first=first, **how
        )
        assert out[i].equal(wanted)
    assert buffer[:, -GAP:].eq(0xAB).all()
    assert residual is None or residual.equal(apart)


@needs_triton
@pytest.mark.parametrize("kind", ["float32", "float16", "payload"])
@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize(("bits_in", "bits_out"), list(itertools.product(BITS, BITS)))
def test_a_second_hop_with_feedback_has_the_same_bits(
    bits_in: Any, bits_out: Any, seed: int | None, kind: str
) -> None:
    for n, rotation in ((333, 0), (4128, 64)):
        formats = Format(bits_in, 128, rotation), Format(bits_out, 128, rotation)
        payloads = torch.stack([encode(rows_of(2, n, i), formats[0]) for i in range(3)])
        found, kept = [], []
        for backend in ("triton", "reference"):
            kept.append(residuals_of(2, n, formats[1], kind))
            how = {"divide": 3, "seed": seed, "residual": kept[-1], "backend": backend}
            found.append(decode_sum_encode(payloads, n, *formats, **how))
        assert found[0].equal(found[1])
        assert kept[0].equal(kept[1])


@needs_triton
def test_rotations_change_between_hops_with_feedback() -> None:
    n, format_in, format_out = 1000, Format("int8", 128, 64), Format("int4", 128, 32)
    payloads = torch.stack([encode(draw(n, seed=i), format_in) for i in range(2)])
    found = []
    for backend in ("triton", "reference"):
        residual = make_residual(n, format_out, "float32")
        found.append(
            decode_sum_encode(payloads, n, format_in, format_out, residual=residual, backend=backend)
        )
    assert_same_code_by_code(found, n, format_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["float32", "payload"])
@pytest.mark.parametrize("rotation", [0, 32])
def test_over_steps_a_second_hop_loses_nothing(rotation: int, kind: str, backend: Any) -> None:
    """The mean of what is sent comes to the sum: off by a step over the number of steps, not by a step."""
    n, steps = 640, 16
    format_in, format_out = Format("int8", 128, rotation), Format("int4", 128, rotation)
    payloads = torch.stack([encode(draw(n, seed=i), format_in) for i in range(3)])
    exact = decode_sum(payloads, n, format_in, divide=3).double()
    shape = payload_bytes(n, Format("int8")) if kind == "payload" else residual_numel(n, format_out)
    residual = torch.zeros(shape, dtype=torch.uint8 if kind == "payload" else torch.float32, device=DEVICE)
    errors = {}
    for kept in (None, residual):
        sent = torch.zeros_like(exact)
        for _ in range(steps):
            payload = decode_sum_encode(
                payloads, n, format_in, format_out, divide=3, residual=kept, backend=backend
            )
            sent += decode(payload, n, format_out).double()
        errors[kept is None] = float((sent / steps - exact).norm() / exact.norm())
    assert errors[True] > 0.05
    assert errors[False] < 2.5 / steps * errors[True]


def test_no_rows() -> None:
    format, none = Format("int8"), torch.empty(0, 256)
    payload = encode(none, format)
    assert payload.shape == (0, payload_bytes(256, format))
    assert decode(payload, 256, format).shape == (0, 256)
    assert decode_add(payload, 256, format, none) is none
    assert decode_sum_encode(payload[None], 256, format, format).shape == payload.shape


@needs_triton
def test_payloads_of_rows_more_than_31_bits_apart() -> None:
    m, n, format = 3, 300, Format("int8")
    size, stride = payload_bytes(n, format), 2**31 + 32
    memory = torch.empty(2 * stride + size, dtype=torch.uint8, device=DEVICE)  # pages never touched are free
    far = memory.as_strided((m, size), (stride, 1))
    near = encode(rows_of(m, n), format, backend="triton")
    assert encode(rows_of(m, n), format, out=far, backend="triton").equal(near)
    assert decode(far, n, format, backend="triton").equal(decode(near, n, format, backend="triton"))
    again = decode_sum_encode(near[None], n, format, format, out=far, backend="triton")
    assert again.equal(decode_sum_encode(near[None], n, format, format, backend="triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory that is never touched is free on the CPU only")
@needs_triton
def test_more_than_31_bits_of_elements() -> None:
    """The first blocks of three rows, of which the last begins at element 2^31."""
    m, n, format = 3, 2**30, Format("int8")
    x = torch.empty(m, n, dtype=torch.float16)
    out = torch.empty(m, payload_bytes(n, format), dtype=torch.uint8)
    back = torch.empty(m, n, dtype=torch.float16)
    constants, options = quantize_launch._launch("sm_80", n, format.block)
    count = constants["G"] * format.block
    x[:, :count] = rows_of(m, count, dtype=torch.float16)
    stride = out.stride(0) // 16
    how = quantize_launch._encoding(format, x.dtype, False, False)
    quantize_kernels.encode_kernel[(1, m)](
        x, None, None, out, n // 16, 0, stride, 0, 0, **constants, **how, **options
    )
    how = quantize_launch._decoding(format, False)
    quantize_kernels.decode_kernel[(1, m)](
        out, back, n // 16, 1, 0, stride, 1.0, **constants, **how, **options
    )
    near = encode(x[:, :count].contiguous(), format, backend="reference")
    codes = torch.stack([parts(p, count, format).codes for p in near])
    assert out[:, :count].equal(codes.flatten(1))
    assert back[:, :count].equal(decode(near, count, format, dtype=torch.float16, backend="reference"))
