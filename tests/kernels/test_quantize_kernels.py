"""The kernels that quantise in Triton's interpreter, bit by bit against their definition; on a GPU as well.

bf16 can be read in the interpreter, but what is stored is cut instead of rounded: fp16 stands for it.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels.payload import Format, parts, payload_bytes, residual_numel
from dtrain.kernels.quantize import decode, decode_add, decode_sum, decode_sum_encode, encode
from tests.kernels.attention_checks import DEVICE, needs_triton
from tests.kernels.test_quantize import hadamard

BITS = ("int8", "fp8", "int4")
SIZES = [1, 63, 127, 129, 500, 8192 + 16]  # the last is a multiple of 16, and more than a program's


def draw(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different sizes, with a block of zeros and both signs of zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()
    x[160:300] = 0.0
    x[161:162] = -0.0
    return x.to(DEVICE, dtype)


def make_residual(n: int, format: Format, kind: str) -> Tensor | None:
    if kind == "none":
        return None
    residual = 0.1 * draw(residual_numel(n, format), seed=7)
    if kind == "payload":
        return encode(residual[:n], Format("int8", format.block), backend="reference")
    return residual.to(getattr(torch, kind))


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; NaN is NaN."""
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def encode_both(
    x: Tensor, format: Format, kind: str = "none", **options: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Payloads and residuals, by the kernel and by the definition."""
    residuals = [make_residual(x.numel(), format, kind) for _ in range(2)]
    payloads = [
        encode(x, format, residual=residual, backend=backend, **options)
        for residual, backend in zip(residuals, ("triton", "reference"), strict=True)
    ]
    return payloads, residuals


@needs_triton
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("block", [32, 128, 512])
@pytest.mark.parametrize("bits", BITS)
def test_the_same_bits(bits: Any, block: int, n: int) -> None:
    format = Format(bits, block)
    for seed, dtype in ((None, torch.float32), (2**62 + 5, torch.float16), (3, torch.bfloat16)):
        payloads, _ = encode_both(draw(n, dtype=dtype), format, seed=seed, first=5 * block)
        assert payloads[0].equal(payloads[1])
    dtypes = (torch.float32, torch.float16)
    for dtype in dtypes:
        found, wanted = (
            decode(payloads[0], n, format, dtype=dtype, backend=b) for b in ("triton", "reference")
        )
        assert found.equal(wanted)


@needs_triton
@pytest.mark.parametrize("kind", ["float32", "float16", "payload"])
@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("bits", BITS)
def test_the_same_bits_with_differences_and_residuals(bits: Any, seed: int | None, kind: str) -> None:
    for n, block in ((127, 64), (4100, 128)):
        x, minus = draw(n), draw(n, seed=1, dtype=torch.bfloat16)
        format = Format(bits, block)
        payloads, residuals = encode_both(x, format, kind, minus=minus, seed=seed, first=2**33)
        assert payloads[0].equal(payloads[1])
        assert residuals[0].equal(residuals[1])


def assert_same_code_by_code(payloads: list[Tensor], n: int, format: Format) -> None:
    """Scales at most a step of bf16 apart, and hardly a code, as sums were rounded in another order."""
    found, wanted = (parts(p, n, format) for p in payloads)
    apart = (found.scales.int() - wanted.scales.int()).abs()
    assert apart.max() <= 1
    assert apart.count_nonzero() <= 1 + len(apart) // 50
    codes = found.codes[apart == 0] != wanted.codes[apart == 0]
    assert codes.count_nonzero() <= 1 + codes.numel() // 1000
    unrotated = Format(format.bits, format.block)
    first, second = (decode(p, n, unrotated, backend="reference") for p in payloads)
    steps = first.abs().max() / {"int8": 100, "fp8": 13, "int4": 6}[format.bits]
    assert (first - second).abs().max() <= steps


@needs_triton
@pytest.mark.parametrize(("block", "rotation"), [(32, 32), (64, 32), (128, 64), (128, 128), (512, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_rotated(bits: Any, block: int, rotation: int) -> None:
    format = Format(bits, block, rotation)
    for n, kind, dtype in (
        (300, "float32", torch.float32),
        (8192, "none", torch.float16),
        (77, "payload", torch.float32),
    ):
        payloads, residuals = encode_both(draw(n, dtype=dtype), format, kind, seed=3)
        assert_same_code_by_code(payloads, n, format)
        if kind == "float32":
            equal = (residuals[0] - residuals[1]).abs() <= 1e-5 * draw(n).abs().max()
            assert equal.float().mean() > 0.99
        decoded = [decode(payloads[0], n, format, backend=b) for b in ("triton", "reference")]
        assert (decoded[0] - decoded[1]).abs().max() <= 1e-6 * decoded[1].abs().max()
        if bits != "fp8":  # sums of whole numbers of a scale: exact in any order
            assert decoded[0].equal(decoded[1])


@needs_triton
@pytest.mark.parametrize("values", ["all", "unchanged"])
def test_a_rotation_is_as_precise_as_fp32(values: str) -> None:
    """By the residual of a payload that is all but zero: what was to be sent is what is kept."""
    format, n = Format("int4", 128, 64), 1280
    x = draw(n, dtype=torch.float32 if values == "all" else torch.float16)
    residual = torch.zeros(n, device=DEVICE)
    payload = encode(x, format, residual=residual, backend="triton")
    v = residual.double() + decode(payload, n, Format("int4"), backend="reference").double()
    h = hadamard(64).double().to(x.device) / 8
    exact = (x.double().view(-1, 64) @ h).flatten()
    assert (v - exact).norm() <= 3e-7 * exact.norm()


@needs_triton
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 129, 8208])
@pytest.mark.parametrize("bits", BITS)
def test_sums(bits: Any, n: int, k: int) -> None:
    format = Format(bits)
    payloads = torch.stack([encode(draw(n, seed=i), format, backend="reference") for i in range(k)])
    for dtype, divide in ((torch.float32, 1), (torch.float32, k), (torch.float16, 7)):
        found, wanted = (
            decode_sum(payloads, n, format, dtype=dtype, divide=divide, backend=b)
            for b in ("triton", "reference")
        )
        assert found.equal(wanted)
    for dtype in (torch.float32, torch.float16):
        found, wanted = (
            decode_add(payloads[0], n, format, draw(n, dtype=dtype), backend=b)
            for b in ("triton", "reference")
        )
        assert found.equal(wanted)


@needs_triton
@pytest.mark.parametrize(("bits_in", "bits_out"), list(itertools.product(BITS, BITS)))
def test_summed_and_encoded_again(bits_in: Any, bits_out: Any) -> None:
    for n, seed in ((129, None), (4128, 8)):
        for rotation in (0, 64):
            formats = Format(bits_in, 128, rotation), Format(bits_out, 128, rotation)
            payloads = torch.stack(
                [encode(draw(n, seed=i), formats[0], backend="reference") for i in range(3)]
            )
            found, wanted = (
                decode_sum_encode(payloads, n, *formats, divide=3, seed=seed, first=256, backend=b)
                for b in ("triton", "reference")
            )
            assert found.equal(wanted)


@needs_triton
@pytest.mark.parametrize("rotations", [(64, 0), (0, 64), (128, 32)])
def test_rotations_change_between_hops(rotations: tuple[int, int]) -> None:
    n = 1000
    format_in, format_out = (Format("int8", 128, r) for r in rotations)
    payloads = torch.stack([encode(draw(n, seed=i), format_in, backend="reference") for i in range(2)])
    found, wanted = (
        decode_sum_encode(payloads, n, format_in, format_out, divide=2, backend=b)
        for b in ("triton", "reference")
    )
    assert_same_code_by_code([found, wanted], n, format_out)


EXTREME = [
    math.nan, math.inf, -math.inf, 2.0**127, -3.4e38, 1.69e38, 65504.0,
    2.0**-110, 1.99 * 2.0**-111, 2.0**-126, 1e-40, -1e-45, 0.0, -0.0,
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_values(bits: Any, seed: int | None) -> None:
    format = Format(bits, 32)
    x = torch.zeros(len(EXTREME), 2, 32, device=DEVICE)
    x[:, :, 3] = torch.tensor(EXTREME, device=DEVICE)[:, None]
    x[:, 1, 10:] = 1e-3 * draw(len(EXTREME) * 22).view(len(EXTREME), 22)
    x[:, 1, 20] = x[:, 1, 3] / 2.0
    x = x.flatten()
    n = x.numel()
    for kind in ("none", "float32", "payload"):
        payloads, residuals = encode_both(x, format, kind, seed=seed)
        assert payloads[0].equal(payloads[1])
        if kind != "none":
            assert residuals[0].equal(residuals[1])
    both = torch.stack([payloads[0], encode(draw(n), format, backend="reference")])
    sums = [decode_sum(both, n, format, backend=b) for b in ("triton", "reference")]
    assert same(*sums)
    assert sums[0].isnan().any()
    again = [decode_sum_encode(both, n, format, format, backend=b) for b in ("triton", "reference")]
    assert again[0].equal(again[1])


HIGH, LOW = (
    4_945_752,
    4_810_331,
)  # elements whose words under seed 5 have ones, or zeros, in all upper 23 bits


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(
    ("bits", "value", "scale"), [("int8", 127 + 2.0**-17, 1.0), ("int4", 9.1328125, 1.3046875)]
)
def test_chance_does_not_leave_the_range(bits: Any, value: float, scale: float, backend: Any) -> None:
    """The reciprocal of this scale takes this value above the largest code, if only just."""
    format = Format(bits)
    assert torch.tensor(value) * (1 / torch.tensor(scale)) > format.largest
    for element, sign in ((HIGH, 1), (LOW, -1)):
        x = torch.full((128,), sign * value, device=DEVICE)
        payload = encode(x, format, seed=5, first=element // 128 * 128, backend=backend)
        found = decode(payload, 128, format, backend="reference")
        assert found.eq(sign * format.largest * scale).all()


@needs_triton
@pytest.mark.parametrize("n", [1, 129, 4096, 4112])
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 512, 128), Format("fp8", 32)])
def test_every_byte_is_written_and_none_beyond(format: Format, n: int) -> None:
    """At an offset in a larger buffer; the padding is zero whatever lay there."""
    size, beyond = payload_bytes(n, format), 2**14

    def inside(count: int, value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        buffer = torch.full((16 + count + beyond,), value, dtype=dtype, device=DEVICE)
        return buffer, buffer[16 : 16 + count]

    def untouched(buffer: Tensor, count: int) -> bool:
        outside = torch.cat([buffer[:16], buffer[16 + count :]])
        return bool((outside.isnan() if buffer.is_floating_point() else outside.eq(0xAB)).all())

    payloads = []
    for value in (0xAB, 0xCD):
        buffer, payload = inside(size, value, torch.uint8)
        encode(draw(n), format, out=payload, backend="triton")
        payloads.append(payload)
        assert value == 0xCD or untouched(buffer, size)
    assert payloads[0].equal(payloads[1])
    assert parts(payloads[0], n, format).padding.eq(0).all()

    buffer, out = inside(n, math.nan, torch.float16)
    decode(payloads[0], n, format, out=out, backend="triton")
    assert untouched(buffer, n)
    assert out.equal(decode(payloads[0], n, format, dtype=torch.float16, backend="triton"))

    buffer, again = inside(size, 0xAB, torch.uint8)
    decode_sum_encode(payloads[0][None], n, format, format, out=again, backend="triton")
    assert untouched(buffer, size)

    count = residual_numel(n, format)
    buffer, residual = inside(count, math.nan, torch.float32)
    residual.zero_()
    encode(draw(n), format, residual=residual, backend="triton")
    assert untouched(buffer, count)
    assert residual.ne(0).any()


@needs_triton
def test_payloads_more_than_31_bits_apart() -> None:
    n, format = 300, Format("int8")
    size, stride = payload_bytes(n, format), 2**31 + 32
    memory = torch.empty(2 * stride + size, dtype=torch.uint8, device=DEVICE)  # pages never touched are free
    far = memory.as_strided((3, size), (stride, 1))
    near = torch.stack([encode(draw(n, seed=i), format, backend="triton") for i in range(3)])
    far.copy_(near)
    assert decode_sum(far, n, format, backend="triton").equal(decode_sum(near, n, format, backend="triton"))


@needs_triton
def test_a_tensor_in_pieces_is_the_whole() -> None:
    format, n = Format("int4", 64, 64), 4096
    x = draw(n)
    whole = parts(encode(x, format, seed=4, backend="triton"), n, format)
    for lo, hi in ((0, 64), (64, 2112), (2112, n)):
        piece = parts(encode(x[lo:hi], format, seed=4, first=lo, backend="triton"), hi - lo, format)
        rows = slice(lo // 64, hi // 64)
        assert piece.codes.equal(whole.codes[rows])
        assert piece.scales.equal(whole.scales[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", [0, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_real_sizes_in_bf16(bits: Any, rotation: int) -> None:
    """The bits of the definition where nothing is rotated, and the same ones in every run."""
    n, format = 2**24 + 40, Format(bits, rotation=rotation)
    x, minus = draw(n, dtype=torch.bfloat16), 0.9 * draw(n, dtype=torch.bfloat16)
    runs = []
    for backend in ("triton", "triton", "reference"):
        residual = torch.zeros(residual_numel(n, format), dtype=torch.bfloat16, device=DEVICE)
        payloads = torch.stack(
            [encode(x, format, minus=minus, residual=residual, seed=s, backend=backend) for s in (None, 1, 2)]
        )
        summed = decode_sum(payloads, n, format, dtype=torch.bfloat16, divide=3, backend=backend)
        again = decode_sum_encode(payloads, n, format, format, divide=3, seed=7, backend=backend)
        into = decode_add(payloads[0], n, format, x.clone(), backend=backend)
        runs.append([payloads, residual, summed, again, into])
    assert [a.equal(b) for a, b in zip(runs[0], runs[1], strict=True)] == [True] * 5
    if rotation == 0:
        assert [a.equal(b) for a, b in zip(runs[0], runs[2], strict=True)] == [True] * 5
    else:
        assert_same_code_by_code([runs[0][0][0], runs[2][0][0]], n, format)
        assert (runs[0][2] - runs[2][2]).float().norm() <= 0.01 * runs[2][2].float().norm()
