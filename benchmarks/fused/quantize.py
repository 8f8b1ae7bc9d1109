"""Cases of quantisation: encode, with the error kept for the next time or not, and what decodes.

Bound by memory: `kernels.quantize` counts the bytes. Payloads are held against the plain definition's byte by
byte. A few may differ where products are summed in another order, or a compiler divides less exactly: a
number that lies between two codes then falls to the other side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import plain_quantize as plain
from benchmarks.case import Cost, Gate
from benchmarks.fused.settings import Settings
from benchmarks.sweep.call import Call, Routine, call_plans
from benchmarks.sweep.contest import Rivals
from benchmarks.sweep.draw import draws
from benchmarks.sweep.errors import relative_error
from benchmarks.sweep.plan import Plan
from dtrain.kernels import quantize as kernels
from dtrain.kernels.quantize import Format

__all__ = ["quantize_plans", "quantize_routines"]

_RANKS = 4
_ROWS = 8
_SEED = 7


def quantize_plans(settings: Settings) -> Iterator[Plan]:
    """Of fp32 tensors, whatever the settings compute in."""
    settings = replace(settings, dtype=torch.float32)
    for routine in quantize_routines(settings):
        yield from call_plans(settings, routine)


def quantize_routines(settings: Settings) -> Iterator[Routine]:
    """Each format by each function, rows, int4 with a rotation and by chance; in a quick run one of each."""
    formats = {bits: Format(bits) for bits in ("int8", "fp8", "int4")}
    makers = (_encode, _feedback, _decode_sum, _decode_add)
    quick = {(_encode, "fp8"), (_feedback, "int4"), (_decode_sum, "int8"), (_decode_add, "int4")}
    for make in makers:
        for bits, format in formats.items():
            if not settings.quick or (make, bits) in quick:
                yield make(settings, bits, format)
    for odd in (False, True):
        yield _encode_rows(settings, formats["int8"], odd)
    yield _decode_sum_rows(settings, formats["int8"])
    yield _encode(settings, "int4_rotated", Format("int4", rotation=32))
    yield _encode(settings, "int4_by_chance", formats["int4"], _SEED)


def _encode(settings: Settings, name: str, format: Format, seed: int | None = None) -> Routine:
    def our_encode(x: Tensor) -> Tensor:
        return kernels.encode(x, format, seed=seed, backend="triton")

    return _routine(
        settings,
        f"encode_{name}",
        "Encode",
        Rivals(partial(plain.encode, format=format, seed=seed), our_encode),
        lambda: [_draw(settings)()],
        Cost(0, kernels.encode_bytes(settings.quantised, format), "tensor read, payload written"),
        gates=(_SAME_BYTES,),
    )


def _encode_rows(settings: Settings, format: Format, odd: bool) -> Routine:
    """What a rank sends in a sum: a row for each rank."""
    m, n = _ROWS, _row_numel(settings, odd)

    def plain_rows(x: Tensor) -> Tensor:
        return torch.stack([plain.encode(row, format) for row in x])

    return Routine(
        f"quantize_encode_{'odd_' if odd else ''}rows_{format.bits}",
        f"Encode, {format.bits}, {m} rows of {n:,} elements",
        Rivals(plain_rows, lambda x: kernels.encode(x, format, backend="triton")),
        lambda: [_draw_rows(settings, m, n)],
        Cost(0, m * kernels.encode_bytes(n, format), "rows read, payloads written"),
        gates=(_SAME_BYTES,),
    )


def _decode_sum_rows(settings: Settings, format: Format) -> Routine:
    """What a node's first hop decodes: sums of as many ranks' payloads, one for each row."""
    m, n = _ROWS, _row_numel(settings, odd=False)

    def plain_sums(payloads: Tensor) -> Tensor:
        return torch.stack([plain.decode_sum(payloads[:, i], n, format) for i in range(m)])

    def payloads() -> Tensor:
        rows = (_draw_rows(settings, m, n) for _ in range(_RANKS))
        return torch.stack([torch.stack([plain.encode(row, format) for row in x]) for x in rows])

    return Routine(
        f"quantize_decode_sum_rows_{format.bits}",
        f"Sums of {_RANKS} payloads, {format.bits}, {m} rows of {n:,} elements",
        Rivals(plain_sums, lambda payloads: kernels.decode_sum(payloads, n, format, backend="triton")),
        lambda: [payloads()],
        Cost(
            0, m * kernels.decode_sum_bytes(n, format, _RANKS), f"{_RANKS} payloads a row read, sums written"
        ),
        gates=(_SAME_NUMBERS,),
    )


def _row_numel(settings: Settings, odd: bool) -> int:
    """Of a row; rows of an odd length begin at no multiple of 16 bytes."""
    return settings.quantised // _ROWS // 16 * 16 - 3 * odd


def _draw_rows(settings: Settings, m: int, n: int) -> Tensor:
    return _draw(settings)()[: m * n].view(m, n)


def _feedback(settings: Settings, name: str, format: Format) -> Routine:
    def plain_encode(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return plain.encode(x, format, residual), residual

    def our_encode(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return kernels.encode(x, format, residual=residual, backend="triton"), residual

    def together(work: Call, base: Call) -> float:
        """Of what payload and residual stand for, both of them: each error is kept."""
        got, want = (
            plain.decode(payload, settings.quantised, format) + residual
            for payload, residual in (work.results(), base.results())
        )
        return relative_error(got, want)

    def draw() -> list[Tensor]:
        one = _draw(settings)
        return [one(), 0.01 * one()]

    return _routine(
        settings,
        f"feedback_{name}",
        "Encode and keep the error",
        Rivals(plain_encode, our_encode),
        draw,
        Cost(
            0,
            kernels.encode_bytes(settings.quantised, format, residual=4),
            "tensor read, payload written, residual both",
        ),
        spent=(1,),
        gates=(_SAME_BYTES, Gate("payload and residual together", 1e-6, together)),
    )


def _decode_sum(settings: Settings, name: str, format: Format) -> Routine:
    n = settings.quantised

    def our_sum(payloads: Tensor) -> Tensor:
        return kernels.decode_sum(payloads, n, format, backend="triton")

    return _routine(
        settings,
        f"decode_sum_{name}",
        f"Sum of {_RANKS} payloads",
        Rivals(partial(plain.decode_sum, n=n, format=format), our_sum),
        lambda: [_payloads(settings, format, _RANKS)],
        Cost(0, kernels.decode_sum_bytes(n, format, _RANKS), f"{_RANKS} payloads read, sum written"),
        gates=(_SAME_NUMBERS,),
    )


def _decode_add(settings: Settings, name: str, format: Format) -> Routine:
    n = settings.quantised

    def plain_add(payload: Tensor, into: Tensor) -> Tensor:
        return plain.decode_add(payload, n, format, into)

    def our_add(payload: Tensor, into: Tensor) -> Tensor:
        return kernels.decode_add(payload, n, format, into, backend="triton")

    return _routine(
        settings,
        f"decode_add_{name}",
        "Add a payload to a tensor",
        Rivals(plain_add, our_add),
        lambda: [_payloads(settings, format, 1)[0], _draw(settings)()],
        Cost(0, kernels.decode_add_bytes(n, format), "payload read, tensor read and written"),
        spent=(1,),
        gates=(_SAME_NUMBERS,),
    )


def _routine(
    settings: Settings,
    name: str,
    title: str,
    rivals: Rivals,
    draw: Callable[[], Sequence[Tensor]],
    cost: Cost,
    **how: Any,
) -> Routine:
    what = f"{title}, {name.replace('_', ' ')}, {settings.quantised:,} elements"
    return Routine(f"quantize_{name}", what, rivals, draw, cost, **how)


def _draw(settings: Settings) -> Callable[[], Tensor]:
    """Tensors whose blocks differ in size."""
    draw, n = draws(settings), settings.quantised
    return lambda: draw(n) * torch.linspace(0.1, 10, n, device=settings.device)


def _payloads(settings: Settings, format: Format, count: int) -> Tensor:
    draw = _draw(settings)
    return torch.stack([plain.encode(draw(), format) for _ in range(count)])


def _unlike(work: Call, base: Call) -> float:
    got, want = work.results()[0], base.results()[0]
    return float((got != want).double().mean()) if got.shape == want.shape else float("inf")


_SAME_BYTES = Gate("share of bytes unlike the definition's", 1e-3, _unlike)
_SAME_NUMBERS = Gate(
    "difference from the definition",
    1e-6,
    lambda work, base: relative_error(work.results()[0], base.results()[0]),
)
