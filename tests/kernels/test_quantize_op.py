"""Quantisation as operators: where payloads lie, what dispatcher and compiler see, bytes, mistakes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import payload as payload_module
from dtrain.kernels import quantize as module
from dtrain.kernels import quantize_launch
from dtrain.kernels.payload import Format, payload_bytes, residual_numel
from dtrain.kernels.quantize import decode, decode_add, decode_sum, decode_sum_encode, encode
from dtrain.kernels.serving import _serve
from tests.kernels.attention_checks import needs_triton
from tests.kernels.test_quantize import FORMATS, draw

OPS = torch.ops.dtrain


@pytest.mark.parametrize("format", FORMATS)
def test_payloads_may_lie_in_a_larger_buffer(format: Format) -> None:
    n, x = 333, draw(333)
    size = payload_bytes(n, format)
    buffer = torch.full((3 * size + 64,), 0xAB, dtype=torch.uint8)
    rows = buffer[16 : 16 + 2 * (size + 16)].view(2, size + 16)[:, :size]
    for i, row in enumerate(rows):
        assert encode(draw(n, seed=i), format, out=row) is row
    apart = torch.stack([encode(draw(n, seed=i), format) for i in range(2)])
    assert rows.equal(apart)
    for gap in (buffer[:16], buffer[16 + size :][:16], buffer[2 * size + 32 :]):
        assert gap.eq(0xAB).all()
    assert decode_sum(rows, n, format).equal(decode_sum(apart, n, format))
    memory = torch.full((n + 7,), math.nan)
    out = memory[3 : 3 + n]
    assert decode(rows[0], n, format, out=out) is out
    assert out.equal(decode(apart[0], n, format))
    assert memory.isnan().sum() == 7
    again = decode_sum_encode(rows, n, format, format, out=buffer[-size:])
    assert again.equal(decode_sum_encode(apart, n, format, format))
    assert encode(x, format, out=buffer[:size]).equal(encode(x, format))


def test_nothing_to_quantise() -> None:
    format, none = Format("int8"), torch.empty(0)
    payload = encode(none, format, residual=none.clone(), minus=none)
    assert payload.shape == (0,)
    assert decode(payload, 0, format).shape == (0,)
    assert decode_add(payload, 0, format, none) is none
    assert decode_sum_encode(payload[None], 0, format, format).shape == (0,)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_parameters_are_taken_as_they_are_and_writes_are_seen(backend: Any) -> None:
    format = Format("int8")
    x = draw(256).requires_grad_()
    into, residual = draw(256).requires_grad_(), torch.zeros(256)
    payload = encode(x, format, residual=residual, backend=backend)
    assert not payload.requires_grad
    versions = [t._version for t in (into, residual, payload)]
    with torch.no_grad():
        decode_add(payload, 256, format, into, backend=backend)
        encode(x, format, out=payload, residual=residual, backend=backend)
    assert all(t._version > v for t, v in zip((into, residual, payload), versions, strict=True))
    versions = [t._version for t in (residual, payload)]
    decode_sum_encode(
        payload.clone()[None], 256, format, format, out=payload, residual=residual, backend=backend
    )
    assert all(t._version > v for t, v in zip((residual, payload), versions, strict=True))
    with torch.inference_mode():
        assert encode(x, format).equal(encode(x.detach().clone(), format))


@pytest.mark.parametrize("server", [pytest.param("triton", marks=needs_triton), "reference"])
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 64, 32)])
def test_operators_keep_their_promises(format: Format, server: str) -> None:
    m, n, how = 2, 200, (format.bits, format.block, format.rotation)
    x, payload = draw(m * n).view(m, n), torch.zeros(m, payload_bytes(n, format), dtype=torch.uint8)
    residual = torch.zeros(m, residual_numel(n, format))
    for extra in ((None, None), (0.5 * x, residual)):
        torch.library.opcheck(OPS.quantize_encode, (x, payload, *extra, *how, 5, format.block, server))
    payloads = torch.stack([encode(x, format), encode(2 * x, format)])
    out = torch.zeros(m, n)
    torch.library.opcheck(OPS.quantize_decode_sum, (payloads, out, *how, 2.0, server))
    torch.library.opcheck(OPS.quantize_decode_add, (payloads[0].clone(), out, *how, server))
    for kept in (None, residual):
        again = (payloads, payload, kept, n, *how[::2], *how, 2.0, None, 0, server)
        torch.library.opcheck(OPS.quantize_decode_sum_encode, again)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_break(backend: Any) -> None:
    torch.compiler.reset()
    format = Format("int8", 64, 32)

    def two_hops(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        payload = encode(x, format, residual=residual, seed=7, backend=backend)
        again = decode_sum_encode(payload[None], len(x), format, format, backend=backend)
        out = decode(again, len(x), format, backend=backend)
        return decode_add(payload, len(x), format, out, backend=backend), residual

    compiled = torch.compile(two_hops, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(draw(640), torch.zeros(640))
    wanted = two_hops(draw(640), torch.zeros(640))
    assert [a.equal(b) for a, b in zip(found, wanted, strict=True)] == [True, True]


def test_bytes_are_those_of_the_tensors() -> None:
    n, format, k = 1000, Format("int4", 128, 64), 3
    x, minus = draw(n, dtype=torch.bfloat16), draw(n)
    residual = torch.zeros(residual_numel(n, format))
    payload = encode(x, format, minus=minus, residual=residual)
    moved = x.nbytes + minus.nbytes + 2 * residual.nbytes + payload.nbytes
    assert module.encode_bytes(n, format, x=2, minus=4, residual=4) == moved
    assert module.encode_bytes(n, format) == 4 * n + payload.nbytes
    payloads = payload.expand(k, -1).contiguous()
    out = decode_sum(payloads, n, format, dtype=torch.bfloat16)
    assert module.decode_sum_bytes(n, format, k, out=2) == payloads.nbytes + out.nbytes
    wide = Format("int8", 128)
    again = decode_sum_encode(payloads, n, format, wide)
    assert module.decode_sum_encode_bytes(n, format, wide, k) == payloads.nbytes + again.nbytes
    kept = 2 * residual.nbytes
    assert module.decode_sum_encode_bytes(n, wide, format, k, residual=4) == (
        module.decode_sum_encode_bytes(n, wide, format, k) + kept
    )
    assert module.decode_add_bytes(n, format, into=2) == payload.nbytes + 2 * out.nbytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": "int2"}, "bits = 'int2'"),
        ({"bits": "int8", "block": 100}, "block = 100: must be a power of two from 32 to 512"),
        ({"bits": "int8", "rotation": 16}, "rotation = 16: must be 0, 32, 64 or 128"),
        ({"bits": "int8", "block": 32, "rotation": 64}, "at most block = 32"),
    ],
)
def test_formats_that_there_are_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format(**given)


X = torch.zeros(256)
INT8 = Format("int8")
PAYLOAD = torch.zeros(payload_bytes(256, INT8), dtype=torch.uint8)
TWO = X.view(2, 128)
ROWS = torch.zeros(2, 280, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode(X.double(), INT8), "x has dtype torch.float64: must be one of torch.float32"),
        (lambda: encode(X.view(2, 2, 64), INT8), r"x \(2, 2, 64\): must be \(n,\), or \(m, n\)"),
        (lambda: encode(X[::2], INT8), r"x \(128,\) and not contiguous"),
        (lambda: encode(X, INT8, out=PAYLOAD[:-16]), r"out \(256,\): must be \(272,\)"),
        (lambda: encode(TWO, INT8, out=PAYLOAD), r"out \(272,\): must be \(2, 144\)"),
        (
            lambda: encode(X.view(2, 128), INT8, residual=X),
            r"residual \(256,\): must be contiguous \(2, 128\)",
        ),
        (
            lambda: encode(X.view(2, 128), INT8, out=ROWS[:, :144]),
            r"out has strides \(280, 1\): must be 1 at",
        ),
        (lambda: encode(X, INT8, minus=X[:5]), r"minus \(5,\)"),
        (lambda: encode(X[:100], Format("int8", 128, 64), residual=X[:100]), r"residual \(100,\).*\(128,\)"),
        (lambda: encode(X, INT8, residual=PAYLOAD[:16]), r"residual \(16,\).*\(272,\)"),
        (lambda: encode(X, INT8, seed=-1), "seed = -1"),
        (lambda: encode(X, INT8, seed=1, first=64), "first = 64: must be a multiple of the block, 128"),
        (lambda: encode(X, INT8, backend="cuda"), "backend = 'cuda'"),
        (lambda: decode(PAYLOAD, 300, INT8), r"payload \(272,\): must be \(400,\)"),
        (lambda: decode(torch.zeros(273, dtype=torch.uint8)[1:], 256, INT8), "payloads begins at address"),
        (lambda: decode(PAYLOAD, 256, INT8, dtype=torch.float16, out=X), "dtype = torch.float16: out has"),
        (lambda: decode(PAYLOAD, 256, INT8, dtype=torch.int32), "out has dtype torch.int32"),
        (lambda: decode_sum(PAYLOAD, 256, INT8), r"payloads \(272,\): must be \(k, 272\)"),
        (lambda: decode_sum(PAYLOAD[None], 256, INT8, divide=0), "divide = 0: must be above 0"),
        (lambda: decode_sum(ROWS[:, :272], 256, INT8), r"payloads has strides \(280, 1\)"),
        (lambda: decode_sum(PAYLOAD[None], 256, INT8, out=X.view(1, 256)), r"out \(1, 256\)"),
        (
            lambda: decode_sum_encode(PAYLOAD[None], 256, INT8, INT8, residual=X[:5]),
            r"residual \(5,\): must be contiguous \(256,\)",
        ),
        (lambda: decode_sum_encode(PAYLOAD[None], 256, INT8, Format("int8", 64)), "block = 64 of format_out"),
        (lambda: decode_add(PAYLOAD, 256, INT8, X[:7]), r"into \(7,\)"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_launch, "can_launch", lambda device: False)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*TRITON_INTERPRET"):
        encode(X, INT8, backend="triton")


def test_a_gpu_that_is_not_served_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve.cache_clear()
    monkeypatch.setattr(quantize_launch, "can_launch", lambda device: False)
    assert [module._server("auto", torch.device("cuda")) for _ in range(2)] == ["reference"] * 2
    assert [r.getMessage() for r in caplog.records] == [
        "quantisation takes several passes: cuda tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the "
        "environment"
    ]


def test_formats_are_made_once() -> None:
    assert payload_module.format_of("int8", 128, 0) is payload_module.format_of("int8", 128, 0)
