"""How the kernels of the fused norm are launched: programs, strides, and what to compile ahead of time.

Which rows a program walks, and so the order of every sum, follows from shapes and the table of architectures
alone, never from how many SMs there are.

Shapes: B samples, N rows of each, D width.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.kernels import norm_kernels
from dtrain.kernels.attention_launch import readable
from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, known_arch
from dtrain.kernels.norm_reference import Norm

__all__ = ["aot_cases", "backward", "forward", "refusal"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 8192

# Not timed. To hide 0.8 µs of latency at 3.35 TB/s, each of an H100's 132 SMs needs 20 KB in flight. Copies
# run two rows ahead: 12 KB a program of the backward at D = 1024 in bf16, of which 4 or 5 share an SM.
_ELEMENTS, _STAGES = 8, 3
_LEAST_WARPS, _MOST_WARPS = 2, 8
# Sums cost 16 bytes a column and program, rows 8 bytes a column: a sixtieth at 128 rows. Fewer, where the
# SMs of a large GPU would have nothing to do; how many it has must not change a bit.
_MOST_ROWS, _PROGRAMS = 128, 512
_SUM = {"AT_ONCE": 128, "COLUMNS": 32}
_SUM_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


class _Launch(NamedTuple):
    """Constants of the kernels, and how they are compiled."""

    constants: dict[str, Any]
    options: dict[str, Any]


@functools.cache
def _launch(arch: str, width: int, unit: int, row_bytes: int) -> _Launch:
    """By shapes and architecture alone.

    Args:
        row_bytes: what is read of a row, from all tensors together.
    """
    arch = known_arch(arch)
    main = 1 << (width.bit_length() - 1)
    tail = 1 << (width - main - 1).bit_length() if width > main else 0
    if tail:  # a copy ahead takes 4 bytes of each thread at least, two of the 8 numbers of 16 bits
        tail = max(tail, main // 4)
    lanes = 64 if arch.startswith("gfx") else 32
    warps = min(max(main // (_ELEMENTS * lanes), _LEAST_WARPS), _MOST_WARPS)
    rows = max(_ELEMENTS * lanes * warps // main, 1)
    ahead = SHARED_BYTES[arch] // 2 // (rows * row_bytes)  # two programs should find room on an SM
    return _Launch(
        {
            "D": width, "MAIN": main, "TAIL": tail, "UNIT": unit,
            "ROWS": rows, "STAGES": min(1 + ahead, _STAGES),
        },
        {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True},
    )  # fmt: skip


def _rows_of_program(samples: int, rows: int, at_once: int) -> int:
    """How many rows of a sample a program walks, `at_once` in each step: by the shapes alone."""
    most = min(max(samples * rows // _PROGRAMS, at_once), _MOST_ROWS)
    programs = -(-rows // most)
    return -(-rows // (programs * at_once)) * at_once


def refusal(device: torch.device, dtypes: Sequence[torch.dtype], width: int) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"{dtype} is none of float16, bfloat16 and float32"
    if width > _WIDEST:
        return f"width {width} is above {_WIDEST}"
    return ""


class _Call(NamedTuple):
    """What a kernel is given.

    Args:
        rows: its tensors as (B, N, D); B is 1 where samples need not be told apart.
        sizes: strides of B and N of these, and of B of the vectors; N; rows of a program.
        samples, programs: B, and the programs of all samples together.
    """

    rows: list[Tensor | None]
    sizes: list[int]
    samples: int
    programs: int
    launch: _Launch


def _call(tensors: Sequence[Tensor | None], vectors: Sequence[Tensor | None], apart: bool = False) -> _Call:
    """Of tensors (B, ..., D) and vectors (B, D); `apart` tells samples apart without a vector."""
    tensors = [None if x is None else readable(x) for x in tensors]
    given = [x for x in tensors if x is not None]
    width = given[0].shape[-1]
    apart = apart or any(v is not None for v in vectors) or not all(_is_even(x) for x in given)
    samples = given[0].shape[0] if apart else 1
    n = given[0].numel() // (samples * width)
    rows = [None if x is None else x.reshape(samples, n, width) for x in tensors]
    strides = [_stride(x, dim) for x in rows for dim in (0, 1)] + [_stride(v, 0) for v in vectors]
    unit = math.gcd(8, width, *strides)
    row_bytes = width * sum(x.element_size() for x in given)
    launch = _launch(arch_of(given[0].device), width, unit, row_bytes)
    of_program = _rows_of_program(samples, n, launch.constants["ROWS"])
    sizes = [s // unit for s in strides] + [n, of_program]
    return _Call(rows, sizes, samples, samples * -(-n // of_program), launch)


def _is_even(x: Tensor) -> bool:
    """Whether one stride leads from row to row, so that x is (rows, D) without a copy."""
    dims = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return all(s == n_after * s_after for (_, s), (n_after, s_after) in itertools.pairwise(dims))


def _stride(x: Tensor | None, dim: int) -> int:
    """That of a dim of one is arbitrary, so 0 will do."""
    return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)


def _readable(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else readable(v) for v in vectors]


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    how: Norm | None,
    s: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    r: Tensor | None,
) -> None:
    """Write s of x and a branch, and with `how` its y, mean and r.

    Args:
        x, branch: (B, ..., D), any strides.
        gate: (B, D), like scale and shift with any stride of B.
        s, y: contiguous, of x's shape; s is there with a branch, y with `how`.
        mean, r: a number for each row, fp32, there with y; the mean for "layer" only.
    """
    weight, bias, scale, shift, kind, eps = how or Norm()
    weight, bias, scale, shift, gate = _readable(weight, bias, scale, shift, gate)
    call = _call((x, branch), (gate, scale, shift))
    with torch.cuda.device_of(x):
        norm_kernels.forward_kernel[(call.programs,)](
            *call.rows, gate, weight, bias, scale, shift, s, y, mean, r, *call.sizes, eps,
            RMS=kind == "rms", **call.launch.constants, **call.launch.options,
        )  # fmt: skip


def backward(
    grad_s: Tensor | None,
    grad_y: Tensor | None,
    s: Tensor | None,
    mean: Tensor | None,
    r: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    how: Norm | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
) -> list[Tensor | None]:
    """Write the gradients by x and branch; returns those by weight, bias, scale, shift and gate.

    Args:
        grad_s, grad_y: (B, ..., D), any strides; grad_y is there with s, mean, r and `how`.
        s, mean, r: as `forward` left them; without a branch s is x, any strides.
        branch: there with a gate, for whose gradient alone it is needed.
        dx, dbranch: contiguous, of s's shape; None is not written.
    """
    weight, bias, scale, shift, kind, _ = how or Norm()
    vectors = (weight, bias, scale, shift, gate)
    weight, bias, scale, gate = _readable(weight, bias, scale, gate)
    call = _call((grad_s, grad_y, s, branch), (gate, scale), apart=shift is not None)
    width = call.launch.constants["D"]
    like = next(x for x in call.rows if x is not None)
    given = [v is not None for v in vectors]
    sums = like.new_empty(sum(given), call.programs, width, dtype=torch.float32)
    slots = iter(sums)
    with torch.cuda.device_of(like):
        norm_kernels.backward_kernel[(call.programs,)](
            *call.rows[:3], mean, r, call.rows[3], gate, weight, bias, scale, dx, dbranch,
            *(next(slots) if there else None for there in given), *call.sizes,
            RMS=kind == "rms", **call.launch.constants, **call.launch.options,
        )  # fmt: skip
        return _totals(sums, vectors[:2], 1) + _totals(sums[sum(given[:2]) :], vectors[2:], call.samples)


def _totals(sums: Tensor, vectors: Sequence[Tensor | None], rows: int) -> list[Tensor | None]:
    """The sums of programs of those vectors that there are, (..., programs, D), added up to 1 or B rows."""
    outputs = [
        None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in vectors
    ]
    given = [x for x in outputs if x is not None]
    if given:
        _, programs, width = sums.shape
        grid = (rows, -(-width // _SUM["COLUMNS"]), len(given))
        padded = [*given, *given[:1] * (3 - len(given))]
        norm_kernels.sum_kernel[grid](
            sums, *padded, programs // rows, programs, D=width, **_SUM, **_SUM_OPTIONS
        )
    return outputs


_BYTES = {"*bf16": 2, "*fp32": 4}
_READ = {"forward": ("X", "BRANCH"), "backward": ("GS", "GY", "S", "BRANCH")}
_FP32 = ("MEAN", "R", "SUMS", "DWEIGHT", "DBIAS", "DSCALE", "DSHIFT", "DGATE")
_STREAM = ("X", "S", "GS", "DX", "WEIGHT", "BIAS")  # fp32 under autocast, where branches are bf16
# What the forms leave out, forwards and backwards.
_FORMS = {
    "everything": ("", ""),
    "norm": ("BRANCH GATE SCALE SHIFT S", "GS BRANCH GATE SCALE DBRANCH DSCALE DSHIFT DGATE"),
    "add_norm": ("GATE SCALE SHIFT", "BRANCH GATE SCALE DBRANCH DSCALE DSHIFT DGATE"),
    "modulated": ("WEIGHT BIAS", "WEIGHT BIAS DWEIGHT DBIAS"),
    "gated_add": (
        "WEIGHT BIAS SCALE SHIFT Y MEAN R",
        "GY S MEAN R WEIGHT BIAS SCALE DX DWEIGHT DBIAS DSCALE DSHIFT",
    ),
}


def aot_cases() -> Iterator[AotCase]:
    """The forms that models use at their widths, in bf16; and with x in fp32, as under autocast."""
    for arch in SHARED_BYTES:
        for width in (768, 1024, 1152, 1536, 2048, 3072):
            yield from _cases(arch, width, "add_norm")
        for form in ("everything", "modulated"):
            yield from _cases(arch, 1152, form)
        yield from _cases(arch, 3072, "everything")
        yield from _cases(arch, 1024, "norm", rms=True)
        yield from _cases(arch, 1024, "gated_add")
        yield from _cases(arch, 1152, "everything", stream="*fp32")
        constants = {"D": 1024, **_SUM}
        yield _case("norm.sums", norm_kernels.sum_kernel, arch, constants, _SUM_OPTIONS, "*bf16")


def _cases(arch: str, width: int, form: str, rms: bool = False, stream: str = "*bf16") -> Iterator[AotCase]:
    name = f"{form} D={width}" + " rms" * rms + " fp32 and bf16" * (stream == "*fp32")
    kernels = {"forward": norm_kernels.forward_kernel, "backward": norm_kernels.backward_kernel}
    for (way, kernel), left_out in zip(kernels.items(), _FORMS[form], strict=True):
        absent = dict.fromkeys(left_out.split())
        row_bytes = width * sum(_BYTES[_type(x, stream)] for x in _READ[way] if x not in absent)
        constants, options = _launch(arch, width, 8, row_bytes)
        given = constants | absent | {"RMS": rms} | ({"MEAN": None} if rms else {})
        yield _case(f"norm.{way} {name}", kernel, arch, given, options, stream)


def _case(
    name: str, kernel: Any, arch: str, constants: dict[str, Any], options: dict[str, Any], stream: str
) -> AotCase:
    signature = {x: _type(x, stream) for x in kernel.arg_names if x not in constants}
    return AotCase(
        name=name,
        kernel=kernel,
        arch=arch,
        signature=signature,
        constexprs=constants,
        divisible=tuple(x for x, kind in signature.items() if kind.startswith("*")),
        options=options,
        tensor_cores=False,
    )


def _type(argument: str, stream: str) -> str:
    if argument == "eps":
        return "fp32"
    if argument == "N" or argument.islower():  # strides and counts
        return "i32"
    return "*fp32" if argument in _FP32 else stream if argument in _STREAM else "*bf16"
