"""AdamW over many shards in one launch: one pass over parameters, gradients, moments and averages.

What is computed is in `adamw_reference`, with the same roundings. How: a table on the device holds a line of
addresses and sizes for each shard, and another the shard of each program; a program walks over some blocks of
128 elements of its shard. The tables stay as long as the tensors stay where they are. Gradients do not: their
addresses, and the seeds of the noise, are sent for each step from pinned memory, which nothing waits for.

A thread holds four consecutive elements of every tensor, 16 bytes in fp32. Shards of which an address, a row
or the start does not allow it are served by a launch of their own, element by element.

Shapes: T blocks of a tile, one row of 128 elements each. In a kernel: i_ index, o_ offsets, m_ mask,
p_ pointer.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.kernels.adamw_reference import (
    BLOCK,
    FIRST_FACTOR,
    FIRST_LARGEST,
    HIGHEST,
    LOWEST,
    MANTISSA,
    SECOND_FACTOR,
    SECOND_LARGEST,
    Scalars,
    Shard,
    blocks_of_row,
)
from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, known_arch, tl, triton
from dtrain.kernels.rounding import from_minifloat, random_bits, random_bits_at, round_bf16, to_minifloat

__all__ = ["aot_cases", "refusal", "update"]

_BLOCK = tl.constexpr(BLOCK)
_MANTISSA = tl.constexpr(MANTISSA)
_FIRST_FACTOR, _FIRST_LARGEST = tl.constexpr(FIRST_FACTOR), tl.constexpr(FIRST_LARGEST)
_SECOND_FACTOR, _SECOND_LARGEST = tl.constexpr(SECOND_FACTOR), tl.constexpr(SECOND_LARGEST)
_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)

_NUMBERS = Scalars._fields


class _Line(NamedTuple):
    """A shard's line in the table: int64 each, sizes in UNIT elements."""

    param: int
    exp_avg: int
    exp_avg_sq: int
    exp_avg_scale: int
    exp_avg_sq_scale: int
    ema: int
    slot: int
    """Its place among the gradients."""
    blocks: int
    blocks_of_row: int
    row: int
    lead: int
    """Elements by which the shard starts after the start of its first block."""
    first_block: int
    """Of the shard, in the whole parameter."""
    first_program: int
    first: int
    """This and the next two in elements: `rounding.Runs`."""
    run: int
    pitch: int


_LINE = tl.constexpr(len(_Line._fields))
# Where the sizes stand in a line, after the addresses.
_SLOT, _BLOCKS, _BLOCKS_OF_ROW, _ROW, _LEAD, _FIRST_BLOCK, _FIRST_PROGRAM = map(tl.constexpr, range(6, 13))
_FIRST, _RUN, _PITCH = map(tl.constexpr, range(13, 16))


@triton.jit
def _pointer(p_address, TYPE: tl.constexpr, UNIT: tl.constexpr):
    """The pointer that stands at an address; to whole UNITs."""
    return tl.multiple_of(tl.load(p_address).to(tl.pointer_type(TYPE)), UNIT * TYPE.primitive_bitwidth // 8)


@triton.jit
def _scale(x):
    """Of blocks (T, 128), see `adamw_reference`: the scale's bits and its inverse, (T,)."""
    top = tl.minimum(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1), 0x7F800000)
    field = tl.maximum((top + 0x7FFFF) >> 23, _LOWEST)
    broken = field > _HIGHEST
    scale = tl.where(broken, 0x7FC00000, field << 23)
    return scale, tl.where(broken, 0, (254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_scale(p, scale, mask):
    tl.store(p, scale.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)


@triton.jit
def _encode_first(m, noise):
    scale, inverse = _scale(m)
    codes = to_minifloat(m * inverse[:, None], noise, _FIRST_FACTOR, _MANTISSA, _FIRST_LARGEST)
    sign = (m.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (codes | sign).to(tl.uint8), scale


@triton.jit
def _encode_second(v, noise):
    scale, inverse = _scale(v)
    noise = (noise << 16) | (noise >> 16)
    codes = to_minifloat(v * inverse[:, None], noise, _SECOND_FACTOR, _MANTISSA, _SECOND_LARGEST)
    return tl.maximum(codes, (v > 0).to(tl.int32)).to(tl.uint8), scale


@triton.jit
def _decode_first(codes, scale):
    codes = codes.to(tl.int32)
    codes = codes & 0x7F | (codes & 0x80) << 5  # the sign comes to bit 31
    return from_minifloat(codes, _FIRST_FACTOR, _MANTISSA) * scale.to(tl.float32)[:, None]


@triton.jit
def _decode_second(codes, scale):
    return from_minifloat(codes, _SECOND_FACTOR, _MANTISSA) * scale.to(tl.float32)[:, None]


@triton.jit
def _spot(
    o_block, blocks, of_row, row, lead, CODED: tl.constexpr, LEADS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Offsets (T, 128) of the elements of blocks in their shard, and which of them are there."""
    PART: tl.constexpr = _BLOCK // UNIT
    o_lane = tl.arange(0, _BLOCK)[None, :]
    if CODED:
        i_row = (o_block.to(tl.uint32) // of_row).to(tl.int64)
        start = (o_block.to(tl.uint32) % of_row).to(tl.int64) * PART  # in the row
        o_units = i_row * row + start
    else:
        start = o_block.to(tl.int64) * PART
        o_units = start - lead
    # Counted in UNITs, so that the compiler sees that all of a UNIT is there, or none.
    end = tl.where(o_block < blocks, tl.minimum(row - start, PART), 0).to(tl.int32) * UNIT
    mask = o_lane < end[:, None]
    if LEADS:
        begin = tl.where(o_block == 0, lead, 0).to(tl.int32) * UNIT
        mask = mask & (o_lane >= begin[:, None])
    return (o_units * UNIT)[:, None] + o_lane, mask


@triton.jit
def _scattered_bits(seed, line, o):
    """Words of elements at offsets `o` of a shard that lies in runs, see `rounding.Runs`."""
    first, run, pitch = tl.load(line + _FIRST), tl.load(line + _RUN), tl.load(line + _PITCH)
    return random_bits_at(seed, first + o // run * pitch + o % run)


@triton.jit
def _store_moments(p_m, p_v, o, mask, p_m_scale, p_v_scale, o_block, m_block, m, v, noise):
    """With noise as codes and scales."""
    if noise is not None:
        m, scale = _encode_first(m, noise)
        _store_scale(p_m_scale + o_block, scale, m_block)
        v, scale = _encode_second(v, noise)
        _store_scale(p_v_scale + o_block, scale, m_block)
    tl.store(p_m + o, m, mask=mask)
    tl.store(p_v + o, v, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def _update_kernel(
    TABLE, CALLS, OWNERS, GRAD_SCALE,
    decay, beta1, rest1, beta2, rest2, step_size, inverse_root, eps, ema_weight,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EMA: tl.constexpr, CODED: tl.constexpr, RUNS: tl.constexpr,
    UNIT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """PARAM, GRAD and EMA are types; EMA and the pointer GRAD_SCALE may be None. RUNS: places lie in runs.

    TABLE has the lines of `_Line`, CALLS the gradient's address and the seed of each slot, OWNERS the line of
    each program.
    """
    ROUND_PARAM: tl.constexpr = tl.bfloat16 == PARAM
    ROUND_EMA: tl.constexpr = tl.bfloat16 == EMA
    RANDOM: tl.constexpr = CODED or ROUND_PARAM or ROUND_EMA
    LEADS: tl.constexpr = RANDOM and not CODED and not RUNS
    MOMENT: tl.constexpr = tl.uint8 if CODED else tl.float32
    line = TABLE + tl.load(OWNERS + tl.program_id(0)).to(tl.int64) * _LINE
    call = CALLS + tl.load(line + _SLOT) * 2
    p_param = _pointer(line, PARAM, UNIT)
    p_m = _pointer(line + 1, MOMENT, UNIT)
    p_v = _pointer(line + 2, MOMENT, UNIT)
    p_m_scale = _pointer(line + 3, tl.bfloat16, 1)
    p_v_scale = _pointer(line + 4, tl.bfloat16, 1)
    p_grad = _pointer(call, GRAD, UNIT)
    seed = tl.load(call + 1)
    if EMA is not None:
        p_ema = _pointer(line + 5, EMA, UNIT)
    blocks = tl.load(line + _BLOCKS).to(tl.int32)
    of_row = tl.load(line + _BLOCKS_OF_ROW).to(tl.uint32)
    row = tl.load(line + _ROW)
    lead = tl.load(line + _LEAD) if LEADS else 0
    first_block = tl.load(line + _FIRST_BLOCK)
    if GRAD_SCALE is not None:
        grad_scale = tl.load(GRAD_SCALE)
    first = (tl.program_id(0) - tl.load(line + _FIRST_PROGRAM).to(tl.int32)) * (TILE * TILES)
    for i_block in range(first, tl.minimum(first + TILE * TILES, blocks), TILE):
        o_block = i_block + tl.arange(0, TILE)
        m_block = o_block < blocks
        o, mask = _spot(o_block, blocks, of_row, row, lead, CODED, LEADS, UNIT)
        param = tl.load(p_param + o, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(p_grad + o, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(p_m + o, mask=mask, other=0)
        v = tl.load(p_v + o, mask=mask, other=0)
        if EMA is not None:
            ema = tl.load(p_ema + o, mask=mask, other=0.0).to(tl.float32)
        if CODED:
            m = _decode_first(m, tl.load(p_m_scale + o_block, mask=m_block, other=0.0))
            v = _decode_second(v, tl.load(p_v_scale + o_block, mask=m_block, other=0.0))

        if GRAD_SCALE is not None:
            grad *= grad_scale
        m = m * beta1 + grad * rest1
        v = v * beta2 + grad * rest2 * grad
        param -= param * decay
        param -= tl.div_rn(m * step_size, tl.sqrt_rn(v) * inverse_root + eps)

        # What needs few registers comes first: then those of the parameters are free for the codes.
        counter = (first_block + o_block) * (_BLOCK // 4)
        if RUNS:
            noise = _scattered_bits(seed ^ 1, line, o)
        elif ROUND_PARAM or ROUND_EMA:
            noise = random_bits(seed ^ 1, counter, _BLOCK)
        if ROUND_PARAM:
            param = round_bf16(param, noise)
        tl.store(p_param + o, param.to(PARAM), mask=mask)
        if EMA is not None:
            ema += (param - ema) * ema_weight
            if ROUND_EMA:
                ema = round_bf16(ema, noise << 16)
            tl.store(p_ema + o, ema.to(EMA), mask=mask)
        noise = random_bits(seed, counter, _BLOCK) if CODED else None
        _store_moments(p_m, p_v, o, mask, p_m_scale, p_v_scale, o_block, m_block, m, v, noise)


class _Tile(NamedTuple):
    """Blocks that a program takes at a time, four elements a thread, and how often."""

    blocks: int
    repeats: int


# Not timed. No kernel spills, by `dtrain.kernels.aot` with Triton 3.6 and 3.9.
_WARPS = 4
_TILES = {
    arch: _Tile(blocks=_WARPS * (64 if arch.startswith("gfx") else 32) * 4 // BLOCK, repeats=16)
    for arch in SHARED_BYTES
}
# Without fused multiply-add a kernel has the bits of `adamw_reference`.
_OPTIONS = {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": False}
_WEIGHTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def refusal(device: torch.device) -> str:
    """Why the kernel cannot serve; empty where it can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    return ""


class _Place(NamedTuple):
    """Where a shard lies, and what of it the kernel is compiled for; a table follows from these alone."""

    addresses: tuple[int, ...]
    blocks: int
    blocks_of_row: int
    row: int
    lead: int
    first_block: int
    runs: tuple[int, int, int]
    kind: tuple[Any, ...]
    """Dtypes of parameter, gradient and average, whether moments are codes, whether noise lies in runs, and
    whether all is aligned."""


class _Launch(NamedTuple):
    kind: tuple[Any, ...]
    table: Tensor
    owners: Tensor
    """Of each program, the line of its shard."""


def _place(shard: Shard, grad: Tensor) -> _Place:
    size, lead = shard.param.numel(), 0
    scattered = shard.random and shard.places.run < size
    if shard.coded:
        of_row = blocks_of_row(shard.row)
        row, blocks, first_block = shard.row, shard.rows * of_row, shard.first_row * of_row
    else:
        first_block, lead = divmod(shard.places.first, BLOCK) if shard.random and not scattered else (0, 0)
        row = lead + size
        blocks = of_row = blocks_of_row(row)
    tensors = shard[:6]
    whole = [x for x in (shard.param, shard.exp_avg, shard.exp_avg_sq, shard.ema, grad) if x is not None]
    aligned = not (row % 4 or lead % 4 or any(x.data_ptr() % (4 * x.element_size()) for x in whole))
    ema = None if shard.ema is None else shard.ema.dtype
    return _Place(
        tuple(0 if x is None else x.data_ptr() for x in tensors),
        blocks, of_row, row, lead, first_block, shard.places,
        (shard.param.dtype, grad.dtype, ema, shard.coded, scattered, aligned),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _launches(
    places: tuple[_Place, ...], per_program: int, device: torch.device, stream: int
) -> list[_Launch]:
    """One launch for each kind of shard; `stream` is where the tables are sent, and so may be read."""
    kinds: dict[tuple[Any, ...], dict[int, _Place]] = {}
    for slot, place in enumerate(places):
        kinds.setdefault(place.kind, {})[slot] = place
    return [_launch(kind, chosen, per_program, device) for kind, chosen in kinds.items()]


def _launch(
    kind: tuple[Any, ...], places: dict[int, _Place], per_program: int, device: torch.device
) -> _Launch:
    unit = 4 if kind[-1] else 1
    lines, owners, first = [], [], 0
    for i, (slot, x) in enumerate(places.items()):
        sizes = (x.blocks, x.blocks_of_row, x.row // unit, x.lead // unit, x.first_block, first)
        lines.append(_Line._make((*x.addresses, slot, *sizes, *x.runs)))
        programs = -(-x.blocks // per_program)
        owners.append(torch.full((programs,), i, dtype=torch.int32))
        first += programs
    return _Launch(kind, _sent(torch.tensor(lines), device), _sent(torch.cat(owners), device))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; on a GPU the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def update(
    pairs: Sequence[tuple[Shard, Tensor]],
    numbers: Scalars,
    seeds: Sequence[int],
    grad_scale: Tensor | None = None,
) -> None:
    """One step of shards that lie on one device, in place, with one launch for each kind of them.

    Args:
        pairs: shards, none empty, and gradients of the parameters' shapes, contiguous, fp32 or bf16.
        numbers: see `adamw_reference.scalars`.
        seeds: of each shard's noise.
        grad_scale: one fp32 number on the device that multiplies gradients.
    """
    device = pairs[0][0].param.device
    tile = _TILES[known_arch(arch_of(device))]
    places = tuple(_place(shard, grad) for shard, grad in pairs)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with torch.cuda.device_of(pairs[0][0].param):
        launches = _launches(places, tile.blocks * tile.repeats, device, stream)
        addresses = [grad.data_ptr() for _, grad in pairs]
        calls = _sent(torch.tensor(list(zip(addresses, seeds, strict=True))), device)
        for kind, table, owners in launches:
            _update_kernel[(len(owners),)](
                table, calls, owners, grad_scale, *numbers, **_constants(kind, tile), **_OPTIONS
            )


def _constants(kind: tuple[Any, ...], tile: _Tile) -> dict[str, Any]:
    param, grad, ema, coded, runs, aligned = kind
    return {
        "PARAM": _WEIGHTS[param],
        "GRAD": _WEIGHTS[grad],
        "EMA": None if ema is None else _WEIGHTS[ema],
        "CODED": coded,
        "RUNS": runs,
        "UNIT": 4 if aligned else 1,
        "TILE": tile.blocks,
        "TILES": tile.repeats,
    }


def aot_cases() -> Iterator[AotCase]:
    """The combinations of dtypes that are of use, and an unaligned one."""
    fp32, bf16 = torch.float32, torch.bfloat16
    kinds = {
        "fp32": (fp32, fp32, None, False, False, True),
        "fp32 ema": (fp32, fp32, fp32, False, False, True),
        "fp32 ema unaligned": (fp32, fp32, fp32, False, False, False),
        "bf16": (bf16, bf16, None, False, False, True),
        "bf16 ema": (bf16, bf16, bf16, False, False, True),
        "bf16 ema in runs": (bf16, bf16, bf16, False, True, True),
        "fp32 8-bit": (fp32, fp32, None, True, False, True),
        "fp32 8-bit ema": (fp32, fp32, fp32, True, False, True),
        "fp32 8-bit ema unaligned": (fp32, fp32, fp32, True, False, False),
        "bf16 8-bit ema": (bf16, bf16, bf16, True, False, True),
    }
    for arch in SHARED_BYTES:
        for name, kind in kinds.items():
            yield AotCase(
                name=f"adamw {name}",
                kernel=_update_kernel,
                arch=arch,
                signature={"TABLE": "*i64", "CALLS": "*i64", "OWNERS": "*i32", "GRAD_SCALE": "*fp32"}
                | dict.fromkeys(_NUMBERS, "fp32"),
                constexprs=_constants(kind, _TILES[arch]),
                divisible=("TABLE", "CALLS", "OWNERS", "GRAD_SCALE"),
                options=_OPTIONS,
                tensor_cores=False,
            )
