"""Quantisation as it is defined, on the CPU: the format byte by byte, bounds, chance, feedback, poison, cuts.

That the kernels give the same bits is in `test_quantize_kernels.py`.
"""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import quantize_reference
from dtrain.kernels.payload import Format, parts, payload_bytes, residual_numel
from dtrain.kernels.quantize import decode, decode_add, decode_sum, decode_sum_encode, encode

BITS = ("int8", "fp8", "int4")
FORMATS = [Format(bits, block, rotation) for bits in BITS for block, rotation in ((128, 0), (64, 32))]


def draw(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different sizes from block to block."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()).to(dtype)


def scales_of(payload: Tensor, n: int, format: Format) -> Tensor:
    return parts(payload, n, format).scales.view(torch.bfloat16).double()


def in_blocks(x: Tensor, format: Format) -> Tensor:
    """(blocks, B) in fp64, zero where x has ended."""
    return torch.nn.functional.pad(x.double(), (0, -len(x) % format.block)).view(-1, format.block)


def hadamard(order: int) -> Tensor:
    """Sylvester's matrix of ±1."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h


def rotated(x: Tensor, format: Format) -> Tensor:
    order = format.rotation
    h = hadamard(order).double() / order**0.5
    return (torch.nn.functional.pad(x.double(), (0, -len(x) % order)).view(-1, order) @ h).flatten()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000, 2**20])
def test_sizes(bits: Any, block: int, n: int) -> None:
    format = Format(bits, block)
    blocks = math.ceil(n / block)
    codes, scales = blocks * block * (4 if bits == "int4" else 8) // 8, 2 * blocks
    assert payload_bytes(n, format) == math.ceil(codes / 16) * 16 + math.ceil(scales / 16) * 16
    payload = encode(torch.zeros(n), format)
    assert payload.shape == (payload_bytes(n, format),)
    of = parts(payload, n, format)
    assert of.codes.numel() == codes
    assert codes % 16 == 0
    assert [x.nbytes for x in of] == [codes, scales, len(payload) - codes - scales]


def test_bits_an_element() -> None:
    n = 2**20
    found = [8 * payload_bytes(n, Format(bits)) / n for bits in BITS]
    assert found == [8.125, 8.125, 4.125]


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_a_payload(bits: Any) -> None:
    """By hand: 33 elements in blocks of 32 with scales 1/4 and 2, of which the second holds one."""
    format, largest = Format(bits, 32), {"int8": 127, "fp8": 448, "int4": 7}[bits]
    x = torch.zeros(33)
    x[0], x[1], x[17], x[32] = largest / 4, -0.75, 0.25, -2 * largest
    payload = encode(x, format).tolist()
    code = {  # of largest, -3, 1 and 0
        "int8": (127, 256 - 3, 1, 0),
        "fp8": (0x7E, 0x80 | 0x44, 0x38, 0),
        "int4": (7 + 8, 8 - 3, 8 + 1, 8),
    }[bits]
    top, minus_three, one, zero = code
    if bits == "int4":
        byte = zero | zero << 4
        first = [top | zero << 4, minus_three | one << 4] + [byte] * 14
        second = [(8 - 7) | zero << 4] + [byte] * 15
    else:
        first = [top, minus_three] + [zero] * 15 + [one] + [zero] * 14
        second = [256 - 127 if bits == "int8" else 0xFE] + [zero] * 31
    assert payload[: len(first)] == first
    assert payload[len(first) : -16] == second
    assert payload[-16:] == [0x80, 0x3E, 0x00, 0x40] + [0] * 12  # bf16, little-endian


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 128, 512])
def test_scales_are_the_smallest_that_keep_codes_in_range(bits: Any, block: int) -> None:
    format, x = Format(bits, block), draw(100 * 512)
    scale = scales_of(encode(x, format), len(x), format)
    needed = in_blocks(x, format).abs().amax(dim=1) / format.largest
    assert (scale >= needed * (1 - 2.0**-23)).all()
    below = (scale.to(torch.bfloat16).view(torch.int16) - 1).view(torch.bfloat16).double()
    assert (below < needed * (1 + 2.0**-23)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 127, 128, 12_345])
def test_no_more_error_than_half_a_step(bits: Any, n: int, dtype: torch.dtype) -> None:
    format, x = Format(bits), draw(n, dtype=dtype)
    payload = encode(x, format)
    scale = scales_of(payload, n, format)[:, None]
    wanted, found = in_blocks(x, format), in_blocks(decode(payload, n, format), format)
    step = scale.expand_as(wanted)
    if bits == "fp8":  # of three bits of mantissa, down to the subnormals' 2^-9
        step = scale * (wanted / scale).abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
    # v · (1/s) is rounded twice: by 2^-23 of the code, which is below 2^9 in units of the step.
    assert ((found - wanted).abs() <= step * (0.5 + 2.0**-14)).all()
    assert (found / scale).abs().max() <= format.largest


def test_fp8_is_pytorchs_e4m3() -> None:
    format, n = Format("fp8"), 128 * 50
    x = draw(n)
    payload = encode(x, format)
    scale = parts(payload, n, format).scales.view(torch.bfloat16).float()[:, None]
    wanted = (x.view(-1, 128) * (1 / scale)).to(torch.float8_e4m3fn)
    assert parts(payload, n, format).codes.equal(wanted.view(torch.uint8))
    assert decode(payload, n, format).view(-1, 128).equal(wanted.float() * scale)


@pytest.mark.parametrize("bits", BITS)
def test_by_chance_right_on_average(bits: Any) -> None:
    """A bias of 1 % of the step is 10 standard errors of the mean or more: it would not pass."""
    n, format = 2**18, Format(bits)
    for value, step in (
        (0.3, 1.0),
        (-1.9, 1.0 if bits != "fp8" else 1 / 8),
        (5.01, 1.0 if bits != "fp8" else 0.5),
    ):
        x = torch.full((n,), value)
        x[::128] = format.largest  # scale 1
        found = decode(encode(x, format, seed=3), n, format).double()
        assert (found[::128] == format.largest).all()
        rest = found.view(-1, 128)[:, 1:] - value
        if bits == "fp8":
            step = 2.0 ** (math.floor(math.log2(abs(value))) - 3)
        assert rest.abs().max() < step
        assert rest.unique().numel() == 2
        assert abs(rest.mean()) < 5 * 0.5 * step / math.sqrt(rest.numel())


@pytest.mark.parametrize("bits", BITS)
def test_chance_leaves_codes_as_they_are(bits: Any) -> None:
    format, x = Format(bits), draw(1280)
    once = decode(encode(x, format), 1280, format)
    for seed in range(20):
        scale = scales_of(encode(once, format, seed=seed), 1280, format)
        if scale.equal(scales_of(encode(x, format), 1280, format)):
            assert decode(encode(once, format, seed=seed), 1280, format).equal(once)


def test_chance_depends_on_seed_and_place() -> None:
    x, format = torch.full((4096,), 0.5), Format("int8")
    x[::128] = 127
    codes = [
        parts(encode(x, format, seed=s, first=f), 4096, format).codes for s, f in ((1, 0), (2, 0), (1, 4096))
    ]
    for a, b in itertools.combinations(codes, 2):  # half of the 4,064 differ, with a deviation of 32
        assert abs(int((a != b).sum()) - 2032) < 5 * 32


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", [None, 11])
def test_a_tensor_in_pieces_is_the_whole(format: Format, seed: int | None) -> None:
    """Cut at blocks, with its residual: blocks have nothing to do with others, elements their own noise."""
    n, first = 5000, 3 * format.block
    x, minus, residual = draw(n), 0.9 * draw(n), 0.1 * draw(residual_numel(n, format), seed=1)
    residuals = residual.clone(), residual.clone()
    whole = encode(x, format, seed=seed, first=first, minus=minus, residual=residuals[0])
    wanted = parts(whole, n, format)
    cuts = [0, format.block, 17 * format.block, 18 * format.block, n]
    for lo, hi in itertools.pairwise(cuts):
        end = residual_numel(hi, format) if hi == n else hi
        piece = encode(
            x[lo:hi], format, seed=seed, first=first + lo, minus=minus[lo:hi], residual=residuals[1][lo:end]
        )
        found = parts(piece, hi - lo, format)
        rows = slice(lo // format.block, lo // format.block + len(found.codes))
        assert found.codes.equal(wanted.codes[rows])
        assert found.scales.equal(wanted.scales[rows])
        assert found.padding.eq(0).all()
    assert residuals[0].equal(residuals[1])


@pytest.mark.parametrize("format", FORMATS)
def test_pieces_of_the_cache_do_not_show(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 70_001

    def everything() -> list[Tensor]:
        residual = torch.zeros(residual_numel(n, format))
        payloads = torch.stack([encode(draw(n, seed=i), format, seed=i) for i in range(3)])
        encode(draw(n, seed=5), format, residual=residual)
        again = decode_sum_encode(payloads, n, format, Format(format.bits, format.block), divide=3)
        into = decode_add(payloads[0], n, format, draw(n, seed=9))
        return [payloads, residual, again, into, decode_sum(payloads, n, format, dtype=torch.bfloat16)]

    whole = everything()
    monkeypatch.setattr(quantize_reference, "_PIECE", 1024)
    assert [a.equal(b) for a, b in zip(everything(), whole, strict=True)] == [True] * 5


@pytest.mark.parametrize("format", FORMATS)
def test_poison_stays_poison_and_in_its_block(format: Format) -> None:
    n, zeros = 5 * format.block - 3, torch.zeros(5 * format.block - 3)
    for bad in (math.nan, math.inf, -math.inf, 2.0**127):
        if format.rotation and bad == 2.0**127:  # no longer so large when it is spread
            continue
        x = draw(n)
        x[format.block + 1] = bad
        payload = encode(x, format, seed=1)
        poisoned = torch.zeros(n, dtype=torch.bool)
        poisoned[format.block : 2 * format.block] = True
        payloads = torch.stack([payload, encode(draw(n, seed=1), format)])
        summed = decode_sum(payloads, n, format)
        again = decode(decode_sum_encode(payloads, n, format, format, divide=2), n, format)
        added = decode_add(payload, n, format, torch.ones(n))
        for found in (decode(payload, n, format), summed, again, added):
            assert found.isnan().equal(poisoned)
        clean = encode(torch.where(poisoned, 0.0, x), format, seed=1)
        assert decode(payload, n, format)[~poisoned].equal(decode(clean, n, format)[~poisoned])
        assert parts(payload, n, format).codes[1].equal(parts(encode(zeros, format), n, format).codes[0])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "payload"])
@pytest.mark.parametrize("format", FORMATS)
def test_one_poisoned_step_does_not_poison_the_next(format: Format, kind: str) -> None:
    n = 5 * format.block
    residual, x = make_residual(n, format, kind), draw(n)
    encode(x, format, residual=residual)
    bad = x.clone()
    bad[format.block] = math.nan
    encode(bad, format, residual=residual)
    kept = residual if kind != "payload" else decode(residual, n, Format("int8", format.block))
    block = slice(format.block, 2 * format.block)
    assert kept[block].eq(0).all()
    assert kept.isfinite().all()
    assert kept.ne(0).any()
    assert decode(encode(x, format, residual=residual), n, format).isfinite().all()


def make_residual(n: int, format: Format, kind: str) -> Tensor:
    if kind == "payload":
        return torch.zeros(payload_bytes(n, Format("int8", format.block)), dtype=torch.uint8)
    return torch.zeros(residual_numel(n, format), dtype=getattr(torch, kind))


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_next_to_nothing(bits: Any) -> None:
    format = Format(bits)
    for value in (0.0, 2.0**-111, 1e-40):
        payload = encode(torch.full((256,), value), format)
        assert scales_of(payload, 256, format).tolist() == [1.0, 1.0]
        assert decode(payload, 256, format).eq(0).all()
    smallest = torch.full((128,), 2.0**-110)
    error = (decode(encode(smallest, format), 128, format) - smallest).abs().max()
    assert error <= 2.0**-113


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("n", [1, 300, 1280])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_sent_and_what_is_kept_are_the_whole(format: Format, n: int, seed: int | None) -> None:
    """decoded + new residual = v: exactly to the nearest, but for what fp32 has of v by chance."""
    x, minus = draw(n), draw(n, seed=1, dtype=torch.bfloat16)
    old = 0.1 * draw(residual_numel(n, format), seed=2)
    new = old.clone()
    payload = encode(x, format, seed=seed, minus=minus, residual=new)
    difference = x - minus
    v = (rotated(difference, format) if format.rotation else difference.double()) + old.double()
    unrotated = Format(format.bits, format.block)
    sent = decode(payload, n, unrotated).double()
    sent_all = parts(payload, n, format).scales.numel() * format.block
    sent = decode(payload, sent_all, unrotated).double()[: len(old)]
    tolerance = 4e-6 * float(v.abs().max())
    assert (sent + new.double() - v).abs().max() <= tolerance
    if not format.rotation:
        exact = (difference + old).double()
        limit = 0.0 if seed is None else 2.0**-24 * scales_of(payload, n, format).max()
        assert (sent + new.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "payload"])
@pytest.mark.parametrize("format", FORMATS)
def test_over_steps_nothing_is_lost(format: Format, kind: str) -> None:
    """Σ decoded = Σ x - the last residual, up to what the residual's own format drops a step."""
    n, steps = 640, 20
    residual = make_residual(n, format, kind)
    sent, total, dropped = torch.zeros(n).double(), torch.zeros(n).double(), 0.0
    for step in range(steps):
        x = draw(n, seed=step)
        sent += decode(encode(x, format, residual=residual), n, format).double()
        total += x.double()
        kept = residual if kind != "payload" else decode(residual, n, Format("int8", format.block))
        unit = {"float32": 2.0**-22, "bfloat16": 2.0**-9, "payload": 1 / 250}[kind]
        dropped += unit * float(kept.abs().max()) * (format.rotation or 1) ** 0.5
    last = rotated(kept, format) if format.rotation else kept.double()
    slack = 4e-6 * steps * float(total.abs().max())
    assert (sent - (total - last)).abs().max() <= dropped + slack
    plain = sum(decode(encode(draw(n, seed=s), format), n, format).double() for s in range(steps))
    assert (sent - total).norm() < 0.5 * (plain - total).norm()


def test_a_rotation_spreads_an_outlier() -> None:
    """In 4 bits one outlier costs its block everything else; rotated, the others are kept."""
    n = 128 * 64
    x = draw(n, dtype=torch.float32).clamp(-3, 3)
    x[::128] = 100.0
    others = torch.ones(n, dtype=torch.bool)
    others[::128] = False
    errors = {}
    for rotation in (0, 128):
        format = Format("int4", rotation=rotation)
        found = decode(encode(x, format), n, format)
        errors[rotation] = float((found - x)[others].norm() / x[others].norm())
    assert errors[0] > 0.99
    assert errors[128] < 0.7 * errors[0]


@pytest.mark.parametrize("order", [32, 64, 128])
def test_the_rotation_is_sylvesters(order: int) -> None:
    """Whole numbers, of which sums are exact: times √order those of the matrix, which undo themselves."""
    x = torch.randint(-100, 100, (6, 256), generator=torch.Generator().manual_seed(0)).float()
    v, scratch = quantize_reference._rotate(x.clone(), torch.empty_like(x), order)
    wanted = (x.view(-1, order) @ hadamard(order)).view_as(x)
    assert v.equal(wanted * order**-0.5)
    back, _ = quantize_reference._rotate(v, scratch, order)
    assert (back - x).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_sums(format: Format, dtype: torch.dtype) -> None:
    n, k = 1001, 4
    payloads = torch.stack([encode(draw(n, seed=i), format) for i in range(k)])
    each = [decode(p, n, format) for p in payloads]
    found = decode_sum(payloads, n, format, dtype=dtype, divide=k)
    wanted = sum(x.double() for x in each) / k
    step = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= (step + 1e-6) * wanted.abs().max()
    if not format.rotation:
        in_order = functools.reduce(torch.add, each)
        assert found.equal((in_order * (1 / k)).to(dtype))


@pytest.mark.parametrize("bits_out", BITS)
@pytest.mark.parametrize("rotations", [(0, 0), (32, 32), (32, 0), (0, 64), (32, 64)])
def test_summed_and_encoded_again(bits_out: Any, rotations: tuple[int, int]) -> None:
    n, k = 1001, 3
    format_in, format_out = (Format(b, 64, r) for b, r in zip(("int8", bits_out), rotations, strict=True))
    payloads = torch.stack([encode(draw(n, seed=i), format_in) for i in range(k)])
    again = decode_sum_encode(payloads, n, format_in, format_out, divide=k, seed=5, first=64)
    summed = decode_sum(payloads, n, format_in, divide=k)
    two_steps = encode(summed, format_out, seed=5, first=64)
    if rotations[0] == 0:
        assert again.equal(two_steps)
    found, wanted = decode(again, n, format_out), decode(two_steps, n, format_out)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()
    assert (found - summed).norm() <= {"int8": 0.03, "fp8": 0.06, "int4": 0.3}[bits_out] * summed.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_added_with_one_rounding(format: Format, dtype: torch.dtype) -> None:
    payload, into = encode(draw(1001), format), draw(1001, seed=1, dtype=dtype)
    wanted = (into.float() + decode(payload, 1001, format)).to(dtype)
    assert decode_add(payload, 1001, format, into) is into
    assert into.equal(wanted)


def test_weights_by_their_difference_come_to_stay() -> None:
    """What everybody holds follows the masters, as each difference is taken against it."""
    format, master = Format("int4"), draw(1280)
    held = torch.zeros(1280, dtype=torch.bfloat16)
    for _ in range(8):
        decode_add(encode(master, format, minus=held), 1280, format, held)
    assert (held - master).abs().max() <= 2.0**-8 * master.abs().max()
