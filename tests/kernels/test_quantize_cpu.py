"""What is compiled for the CPU, bit by bit against its definition."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import quantize as module
from dtrain.kernels import quantize_cpu, quantize_reference
from dtrain.kernels.payload import Format, parts, payload_bytes, residual_numel
from dtrain.kernels.quantize import encode
from tests.kernels.test_quantize import draw
from tests.kernels.test_quantize_kernels import EXTREME, same

pytestmark = pytest.mark.skipif(bool(quantize_cpu.refusal()), reason=f"no compiler: {quantize_cpu.refusal()}")

BITS = ("int8", "fp8", "int4")
LAYOUTS = [(32, 0), (32, 32), (64, 32), (128, 0), (128, 32), (128, 128), (256, 64), (512, 128)]
SIZES = [1, 31, 129, 1000, 4096]
KINDS = ("none", "float32", "bfloat16", "payload")
BOTH = (quantize_cpu, quantize_reference)


def rows_of(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """With blocks of zeros, both of them, and next to nothing."""
    x = draw(m * n, seed)
    x[n // 3 : n // 3 + 200] = 0.0
    x[n // 3 + 50 : n // 3 + 60] = -0.0
    x[2 * n // 3 : 2 * n // 3 + 140] *= 1e-36
    return x.to(dtype).view(m, n)


def residuals_of(m: int, n: int, format: Format, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    residual = 0.1 * rows_of(m, residual_numel(n, format), seed=7)
    if kind == "payload":
        return encode(residual[:, :n].contiguous(), Format("int8", format.block), backend="reference")
    return residual.to(getattr(torch, kind))


def empty_payloads(m: int, n: int, format: Format, fill: int) -> Tensor:
    """At some distance from each other."""
    size = payload_bytes(n, format)
    return torch.full((m, size + 32), fill, dtype=torch.uint8)[:, :size]


def assert_same_encoded(x: Tensor, minus: Tensor | None, format: Format, kind: str) -> None:
    m, n = x.shape
    found = []
    for server, fill in zip(BOTH, (0xAB, 0xCD), strict=True):
        out, residual = empty_payloads(m, n, format, fill), residuals_of(m, n, format, kind)
        server.encode(x, out, minus, residual, format, None, 0)
        found.append((out, residual))
    assert found[0][0].equal(found[1][0])
    assert kind == "none" or same(found[0][1], found[1][1])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("block", "rotation"), LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_encoded(bits: Any, block: int, rotation: int, n: int) -> None:
    format = Format(bits, block, rotation)
    for kind, dtype, minus in itertools.product(
        KINDS, (torch.float32, torch.bfloat16), (None, torch.float32, torch.bfloat16)
    ):
        less = None if minus is None else rows_of(3, n, 1, minus)
        assert_same_encoded(rows_of(3, n, dtype=dtype), less, format, kind)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("block", "rotation"), LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_decoded(bits: Any, block: int, rotation: int, n: int) -> None:
    format, m, k = Format(bits, block, rotation), 3, 4
    payloads = torch.stack([encode(rows_of(m, n, i), format, backend="reference") for i in range(k)])
    for dtype, order, divide in itertools.product(
        (torch.float32, torch.bfloat16), (payloads, payloads.transpose(0, 1)), (1, 3)
    ):
        found = []
        for server in BOTH:
            out = torch.full((order.shape[1], n), math.nan, dtype=dtype)
            server.decode_sum(order, out, divide, format)
            into = rows_of(order.shape[1], n, 9, dtype)
            server.decode_add(order[1], into, format)
            found.append((out, into))
        assert found[0][0].equal(found[1][0])
        assert found[0][1].equal(found[1][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotations", [(0, 0), (32, 32), (0, 64), (64, 32)])
@pytest.mark.parametrize(("bits_in", "bits_out"), list(itertools.product(BITS, BITS)))
def test_summed_and_encoded_again(bits_in: Any, bits_out: Any, rotations: tuple[int, int], kind: str) -> None:
    format_in, format_out = Format(bits_in, 64, rotations[0]), Format(bits_out, 64, rotations[1])
    for n in (1, 1000):
        payloads = torch.stack([encode(rows_of(2, n, i), format_in, backend="reference") for i in range(3)])
        found = []
        for server in BOTH:
            out, residual = empty_payloads(2, n, format_out, 0xAB), residuals_of(2, n, format_out, kind)
            server.decode_sum_encode(payloads, out, residual, n, 3, format_in, format_out, None, 0)
            found.append((out, residual))
        assert found[0][0].equal(found[1][0])
        assert kind == "none" or found[0][1].equal(found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_values(bits: Any, rotation: int, dtype: torch.dtype) -> None:
    format = Format(bits, 32, rotation)
    x = torch.zeros(len(EXTREME), 3, 32)
    x[:, :, 3] = torch.tensor(EXTREME)[:, None]
    x[:, 1, 10:] = 1e-3 * draw(len(EXTREME) * 22).view(len(EXTREME), 22)
    x[:, 1, 20] = x[:, 1, 3] / 2.0
    x[:, 2] *= -1
    rows = x.to(dtype).view(2, -1)
    n = rows.shape[1]
    for kind in KINDS:
        assert_same_encoded(rows, None, format, kind)
    payloads = encode(rows, format, backend="reference")[:, None]
    found = []
    for server in BOTH:
        out, into = torch.empty(1, n, dtype=dtype), torch.ones(1, n, dtype=dtype)
        again = empty_payloads(1, n, format, 0)
        server.decode_sum(payloads, out, 1, format)
        server.decode_add(payloads[0], into, format)
        server.decode_sum_encode(payloads, again, None, n, 2, format, format, None, 0)
        found.append((out, into, again))
    assert [same(a, b) for a, b in zip(*found, strict=True)] == [True] * 3
    assert found[0][0].isnan().any()


def test_every_number_of_bf16_is_rounded_alike() -> None:
    """All patterns plus whole multiples of 2^-8, which are ties for those from 1 to 2."""
    high = torch.arange(2**16, dtype=torch.int32) << 16
    into = torch.stack([high, high]).view(torch.float32).to(torch.bfloat16)
    format = Format("int8")
    x = torch.randint(-127, 128, into.shape, generator=torch.Generator().manual_seed(0)) * 2.0**-8
    x[:, ::128] = 127 * 2.0**-8
    payload = encode(x, format, backend="reference")
    assert module.decode(payload, 2**16, format).equal(x)
    found = []
    for server in BOTH:
        found.append(into.clone())
        server.decode_add(payload, found[-1], format)
    assert same(*found)


@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 128, 32)])
def test_threads_do_not_show(format: Format) -> None:
    n, threads = 300_001, torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            residual = residuals_of(2, n, format, "bfloat16")
            payload = encode(rows_of(2, n), format, residual=residual)
            summed = module.decode_sum(payload[:, None], n, format)
            again = module.decode_sum_encode(payload[:, None], n, format, format, divide=2)
            found.append((payload, residual, summed, again))
    finally:
        torch.set_num_threads(threads)
    assert [a.equal(b) for a, b in zip(*found, strict=True)] == [True] * 4


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float16, None), (torch.float32, 5)])
def test_what_is_not_compiled_is_the_definitions(dtype: torch.dtype, seed: int | None) -> None:
    format, x = Format("int4", 64, 32), rows_of(2, 500, dtype=dtype)
    residuals = [torch.zeros(2, residual_numel(500, format), dtype=dtype) for _ in range(2)]
    found = [
        encode(x, format, seed=seed, residual=residual, backend=backend)
        for residual, backend in zip(residuals, ("auto", "reference"), strict=True)
    ]
    assert found[0].equal(found[1])
    assert residuals[0].equal(residuals[1])
    outs = [module.decode(found[0], 500, format, dtype=dtype, backend=b) for b in ("auto", "reference")]
    assert outs[0].equal(outs[1])
    again = [
        module.decode_sum_encode(found[0][None], 500, format, format, seed=seed, backend=b)
        for b in ("auto", "reference")
    ]
    assert again[0].equal(again[1])


def test_who_serves() -> None:
    cpu = torch.device("cpu")
    assert module._server("auto", cpu) == "compiled"
    assert module._server("reference", cpu) == "reference"


def test_nothing_beyond_is_written() -> None:
    n, format = 333, Format("int4", 128, 32)
    memory = torch.full((3, payload_bytes(n, format) + 64), 0xAB, dtype=torch.uint8)
    out = memory[:, 16 : 16 + payload_bytes(n, format)]
    residual = torch.full((16 + 3 * 352 + 16,), 5.0)
    kept = residual[16:-16].view(3, 352)
    kept.zero_()
    encode(rows_of(3, n), format, out=out, residual=kept)
    assert memory[:, :16].eq(0xAB).all()
    assert memory[:, -48:].eq(0xAB).all()
    assert residual[:16].eq(5).all()
    assert residual[-16:].eq(5).all()
    assert all(parts(row, n, format).padding.eq(0).all() for row in out)
    numbers = torch.full((16 + 3 * n + 16,), 5.0, dtype=torch.bfloat16)
    module.decode(out, n, format, out=numbers[16:-16].view(3, n))
    assert numbers[:16].eq(5).all()
    assert numbers[-16:].eq(5).all()
