"""Quantisation on a CPU by `quantize_cpu.cpp`: the bits of `quantize_reference`, in one pass over memory.

It rounds to nearest and takes fp32 and bf16; fp16, and rounding by chance, are the reference's. Blocks are
shared among as many threads as PyTorch uses.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import quantize_reference as reference
from dtrain.kernels.compiled import load
from dtrain.kernels.payload import Format, residual_numel

__all__ = ["decode_add", "decode_sum", "decode_sum_encode", "encode", "refusal"]

_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.uint8: 3}
_SHARE = 2**17  # elements that are worth a thread

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_TENSOR = (_POINTER, _INT)  # and its type
_PAYLOADS = (_POINTER, _LONG, _LONG, _LONG)  # how many; strides
_RANGE = (_LONG, _LONG)
_ARGUMENTS = {
    "encode": (*_TENSOR, *_TENSOR, *_TENSOR, _LONG, _POINTER, _LONG, _LONG, _INT, _INT, _INT, *_RANGE),
    "decode": (*_PAYLOADS, *_TENSOR, _INT, _LONG, _FLOAT, _INT, _INT, _INT, *_RANGE),
    "decode_sum_encode": (
        *_PAYLOADS, *_TENSOR, _LONG, _POINTER, _LONG, _LONG, _FLOAT, _INT, _INT, _INT, _INT, _INT, *_RANGE,
    ),
}  # fmt: skip


@functools.cache
def _functions() -> dict[str, Callable[..., None]] | str:
    library = load("quantize_cpu.cpp")
    if isinstance(library, str):
        return library
    functions: dict[str, Any] = {name: getattr(library, name) for name in _ARGUMENTS}
    for name, function in functions.items():
        function.argtypes, function.restype = _ARGUMENTS[name], None
    return functions


def refusal() -> str:
    """Why it cannot serve; empty where it can."""
    functions = _functions()
    return functions if isinstance(functions, str) else ""


def _run(name: str, rows: int, n: int, block: int, *args: object) -> None:
    """Call a function for all blocks of rows (rows, n), in threads."""
    functions = _functions()
    assert not isinstance(functions, str), functions
    run, blocks = functions[name], rows * -(-n // block)
    threads = min(torch.get_num_threads(), max(1, rows * n // _SHARE))
    if threads == 1:
        run(*args, 0, blocks)
        return
    ends = [blocks * i // threads for i in range(threads + 1)]
    for done in [_pool(threads).submit(run, *args, *ends[i : i + 2]) for i in range(threads)]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantize")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


def _of(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), _TYPES[x.dtype])


def _takes(*tensors: Tensor | None, seed: int | None = None) -> bool:
    return seed is None and all(x is None or x.dtype in _TYPES for x in tensors)


def _payloads(payloads: Tensor) -> tuple[int, int, int, int]:
    return payloads.data_ptr(), len(payloads), payloads.stride(0), payloads.stride(1)


def encode(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None, format: Format,
    seed: int | None, first: int,
) -> None:  # fmt: skip
    """`quantize_reference.encode`."""
    if not _takes(x, minus, residual, seed=seed):
        reference.encode(x, payload, minus, residual, format, seed, first)
        return
    rows, n = x.shape
    _run(
        "encode", rows, n, format.block, *_of(x), *_of(minus), *_of(residual), residual_numel(n, format),
        payload.data_ptr(), payload.stride(0), n, format.block, format.largest, format.rotation,
    )  # fmt: skip


def decode_sum(payloads: Tensor, out: Tensor, divide: float, format: Format) -> None:
    """`quantize_reference.decode_sum`."""
    if not _takes(out):
        reference.decode_sum(payloads, out, divide, format)
        return
    _decode(payloads, out, False, 1 / divide, format)


def decode_add(payloads: Tensor, into: Tensor, format: Format) -> None:
    """`quantize_reference.decode_add`."""
    if not _takes(into):
        reference.decode_add(payloads, into, format)
        return
    _decode(payloads[None], into, True, 1.0, format)


def _decode(payloads: Tensor, out: Tensor, add: bool, factor: float, format: Format) -> None:
    rows, n = out.shape
    _run(
        "decode", rows, n, format.block, *_payloads(payloads), *_of(out), add, n, factor,
        format.block, format.largest, format.rotation,
    )  # fmt: skip


def decode_sum_encode(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, n: int, divide: float,
    format_in: Format, format_out: Format, seed: int | None, first: int,
) -> None:  # fmt: skip
    """`quantize_reference.decode_sum_encode`."""
    if not _takes(residual, seed=seed):
        reference.decode_sum_encode(
            payloads, payload, residual, n, divide, format_in, format_out, seed, first
        )
        return
    _run(
        "decode_sum_encode", len(payload), n, format_in.block, *_payloads(payloads), *_of(residual),
        residual_numel(n, format_out), payload.data_ptr(), payload.stride(0), n, 1 / divide, format_in.block,
        format_in.largest, format_in.rotation, format_out.largest, format_out.rotation,
    )  # fmt: skip
