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

from dtrain.kernels import payload as payload_module
from dtrain.kernels import quantize as module
from dtrain.kernels import quantize_kernels, quantize_reference
from dtrain.kernels.payload import Format, parts, payload_bytes, residual_numel
from dtrain.kernels.quantize import decode, decode_add, decode_sum, decode_sum_encode, encode
from dtrain.kernels.serving import kernels_serve
from tests.kernels.attention_checks import needs_triton

OPS = torch.ops.dtrain
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


def rotated(x: Tensor, format: Format) -> Tensor:
    order = format.rotation
    h = quantize_reference.hadamard(order).double() / order**0.5
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
def test_the_rotation_is_its_own_inverse(order: int) -> None:
    h = quantize_reference.hadamard(order)
    assert h.equal(h.T)
    assert (h @ h).equal(order * torch.eye(order))
    assert h.abs().eq(1).all()


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


def test_parameters_are_taken_as_they_are_and_writes_are_seen() -> None:
    format = Format("int8")
    x = draw(256).requires_grad_()
    into, residual = draw(256).requires_grad_(), torch.zeros(256)
    payload = encode(x, format, residual=residual)
    assert not payload.requires_grad
    versions = [t._version for t in (into, residual, payload)]
    with torch.no_grad():
        decode_add(payload, 256, format, into)
        encode(x, format, out=payload, residual=residual)
    assert all(t._version > v for t, v in zip((into, residual, payload), versions, strict=True))
    with torch.inference_mode():
        assert encode(x, format).equal(encode(x.detach().clone(), format))


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 64, 32)])
def test_operators_keep_their_promises(format: Format, kernel: bool) -> None:
    n, how = 200, (format.bits, format.block, format.rotation)
    x, payload = draw(n), torch.zeros(payload_bytes(n, format), dtype=torch.uint8)
    residual = torch.zeros(residual_numel(n, format))
    for extra in ((None, None), (draw(n, seed=1), residual)):
        torch.library.opcheck(OPS.quantize_encode, (x, payload, *extra, *how, 5, format.block, kernel))
    payloads = torch.stack([encode(x, format), encode(draw(n, seed=1), format)])
    out = torch.zeros(n)
    torch.library.opcheck(OPS.quantize_decode_sum, (payloads, out, *how, 2.0, kernel))
    torch.library.opcheck(OPS.quantize_decode_add, (payloads[0].clone(), out, *how, kernel))
    again = (payloads, payload, n, *how[::2], *how, 2.0, None, 0, kernel)
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode(X.double(), INT8), "x has dtype torch.float64: must be one of torch.float32"),
        (lambda: encode(X.view(2, 128), INT8), r"x \(2, 128\): must be contiguous \(256,\)"),
        (lambda: encode(X[::2], INT8), r"x \(128,\) and not contiguous"),
        (lambda: encode(X, INT8, out=PAYLOAD[:-16]), r"out \(256,\): must be contiguous \(272,\)"),
        (lambda: encode(X, INT8, minus=X[:5]), r"minus \(5,\)"),
        (lambda: encode(X[:100], Format("int8", 128, 64), residual=X[:100]), r"residual \(100,\).*\(128,\)"),
        (lambda: encode(X, INT8, residual=PAYLOAD[:16]), r"residual \(16,\).*\(272,\)"),
        (lambda: encode(X, INT8, seed=-1), "seed = -1"),
        (lambda: encode(X, INT8, seed=1, first=64), "first = 64: must be a multiple of the block, 128"),
        (lambda: encode(X, INT8, backend="cuda"), "backend = 'cuda'"),
        (lambda: decode(PAYLOAD, 300, INT8), r"payload \(272,\): must be contiguous \(400,\)"),
        (lambda: decode(torch.zeros(273, dtype=torch.uint8)[1:], 256, INT8), "payloads begins at address"),
        (lambda: decode(PAYLOAD, 256, INT8, dtype=torch.float16, out=X), "dtype = torch.float16: out has"),
        (lambda: decode(PAYLOAD, 256, INT8, dtype=torch.int32), "out has dtype torch.int32"),
        (lambda: decode_sum(PAYLOAD, 256, INT8), r"payloads \(272,\): must be \(k, 272\)"),
        (lambda: decode_sum(PAYLOAD[None], 256, INT8, divide=0), "divide = 0: must be above 0"),
        (lambda: decode_sum(torch.zeros(2, 280, dtype=torch.uint8)[:, :272], 256, INT8), "strides"),
        (lambda: decode_sum_encode(PAYLOAD[None], 256, INT8, Format("int8", 64)), "block = 64 of format_out"),
        (lambda: decode_add(PAYLOAD, 256, INT8, X[:7]), r"into \(7,\)"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_kernels, "can_launch", lambda device: False)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*TRITON_INTERPRET"):
        encode(X, INT8, backend="triton")


def test_a_gpu_that_is_not_served_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_serve.cache_clear()
    monkeypatch.setattr(quantize_kernels, "can_launch", lambda device: False)
    assert [module._fused("auto", torch.device("cuda")) for _ in range(2)] == [False, False]
    assert [r.getMessage() for r in caplog.records] == [
        "quantisation takes several passes: cuda tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the "
        "environment"
    ]


def test_formats_are_made_once() -> None:
    assert payload_module.format_of("int8", 128, 0) is payload_module.format_of("int8", 128, 0)
