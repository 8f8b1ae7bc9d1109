"""How the kernels of quantisation are launched, and what to compile ahead of time."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from dtrain.kernels import quantize_kernels
from dtrain.kernels.launch import SHARED_BYTES, AotCase, arch_of, can_launch, known_arch
from dtrain.kernels.payload import Bits, Format, residual_numel

__all__ = ["aot_cases", "decode_add", "decode_sum", "decode_sum_encode", "encode", "refusal"]


class _Launch(NamedTuple):
    """Warps of a program, and elements of a thread."""

    warps: int
    elements: int


# Not timed. No kernel spills, by `dtrain.kernels.aot` with Triton 3.6 and 3.9. A thread holds 16 elements of
# each half. Rotations take registers, which leaves 8; but where four warps share a product, it is of 64 rows.
_PLAIN = _Launch(4, 32)
_ROTATING = _Launch(4, 16)
_SHARED_PRODUCT = {"sm_90": _Launch(8, 32), "sm_100": _Launch(8, 32)}


def refusal(device: torch.device) -> str:
    """Why the kernels cannot serve; empty where they can."""
    if not can_launch(device):
        return f"{device.type} tensors need a GPU and Triton, or TRITON_INTERPRET=1 in the environment"
    return ""


def _launch(arch: str, n: int, block: int, *rotations: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of every kernel, and options of the launch."""
    warps, elements = _PLAIN
    if any(rotations):
        in_pairs = 128 in rotations and block > 128
        warps, elements = _ROTATING if in_pairs else _SHARED_PRODUCT.get(known_arch(arch), _ROTATING)
    elements *= 64 if arch.startswith("gfx") else 32  # of a warp
    blocks = max(8, warps * elements // block)  # 8, as scales are padded to a multiple of it
    options = {
        "num_warps": max(warps, blocks * block // elements),
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    return {"B": block, "G": blocks, "UNIT": 1 if n % 16 else 16}, options


def _grid(rows: int, n: int, constants: dict[str, Any]) -> tuple[int, int]:
    return -(-n // (constants["B"] * constants["G"])), rows


def encode(
    x: Tensor, payload: Tensor, minus: Tensor | None, residual: Tensor | None, format: Format,
    seed: int | None, first: int,
) -> None:  # fmt: skip
    """`quantize_reference.encode` of rows (m, n) in one launch."""
    rows, n = x.shape
    constants, options = _launch(arch_of(x.device), n, format.block, format.rotation)
    unit = constants["UNIT"]
    with torch.cuda.device_of(x):
        quantize_kernels.encode_kernel[_grid(rows, n, constants)](
            x, minus, residual, payload, n // unit, residual_numel(n, format) // unit,
            payload.stride(0) // 16, seed or 0, first,
            **constants, **_encoding(format, x.dtype, minus is not None, seed is not None), **options,
        )  # fmt: skip


def _encoding(format: Format, dtype: torch.dtype, minus: bool, stochastic: bool) -> dict[str, Any]:
    return {
        "LARGEST": format.largest,
        "ROTATION": format.rotation,
        "SHORT": dtype != torch.float32 and not minus,
        "STOCHASTIC": stochastic,
    }


def decode_sum(payloads: Tensor, out: Tensor, divide: float, format: Format) -> None:
    """`quantize_reference.decode_sum` of rows: payloads (k, m, bytes)."""
    _decode(payloads, out, 1 / divide, format, add=False)


def decode_add(payloads: Tensor, into: Tensor, format: Format) -> None:
    """`quantize_reference.decode_add` of rows: payloads (m, bytes)."""
    _decode(payloads[None], into, 1.0, format, add=True)


def _decode(payloads: Tensor, out: Tensor, factor: float, format: Format, add: bool) -> None:
    rows, n = out.shape
    constants, options = _launch(arch_of(out.device), n, format.block, format.rotation)
    with torch.cuda.device_of(out):
        quantize_kernels.decode_kernel[_grid(rows, n, constants)](
            payloads, out, n // constants["UNIT"], len(payloads), *_strides(payloads), factor,
            **constants, **_decoding(format, add), **options,
        )  # fmt: skip


def _strides(payloads: Tensor) -> tuple[int, int]:
    return payloads.stride(0) // 16, payloads.stride(1) // 16


def _decoding(format: Format, add: bool) -> dict[str, Any]:
    return {"LARGEST": format.largest, "ROTATION": format.rotation, "ADD": add}


def decode_sum_encode(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, n: int, divide: float,
    format_in: Format, format_out: Format, seed: int | None, first: int,
) -> None:  # fmt: skip
    """`quantize_reference.decode_sum_encode` of rows: payloads (k, m, bytes)."""
    rotations = {format_in.rotation, format_out.rotation}
    constants, options = _launch(
        arch_of(payload.device), n, format_in.block, *(rotations if len(rotations) == 2 else ())
    )
    unit = constants["UNIT"]
    with torch.cuda.device_of(payload):
        quantize_kernels.decode_sum_encode_kernel[_grid(len(payload), n, constants)](
            payloads, residual, payload, n // unit, residual_numel(n, format_out) // unit, len(payloads),
            *_strides(payloads), payload.stride(0) // 16, 1 / divide, seed or 0, first,
            **constants, **_recoding(format_in, format_out, seed is not None), **options,
        )  # fmt: skip


def _recoding(format_in: Format, format_out: Format, stochastic: bool) -> dict[str, Any]:
    return {
        "LARGEST_IN": format_in.largest,
        "LARGEST": format_out.largest,
        "ROTATION_IN": format_in.rotation,
        "ROTATION": format_out.rotation,
        "STOCHASTIC": stochastic,
    }


_TYPES = {
    "n": "i32", "n_residual": "i32", "k": "i32", "stride": "i64", "stride_k": "i64", "stride_row": "i64",
    "seed": "i64", "first": "i64", "factor": "fp32", "PAYLOAD": "*u8", "PAYLOADS": "*u8", "X": "*fp32",
    "MINUS": "*bf16", "RESIDUAL": "*fp32", "OUT": "*bf16",
}  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Each format in blocks of 128, plain and with all that there is; the largest rotation within a block."""
    nothing = {"MINUS": None, "RESIDUAL": None}
    for arch in SHARED_BYTES:
        for bits in get_args(Bits):
            plain, rotated = Format(bits), Format(bits, rotation=64)
            yield _case(
                "encode",
                quantize_kernels.encode_kernel,
                arch,
                plain,
                nothing | _encoding(plain, torch.float32, False, False),
            )
            yield _case(
                "encode by chance with residual", quantize_kernels.encode_kernel, arch, rotated,
                _encoding(rotated, torch.float32, True, True),
            )  # fmt: skip
            yield _case("decode_sum", quantize_kernels.decode_kernel, arch, plain, _decoding(plain, False))
            yield _case("decode_add", quantize_kernels.decode_kernel, arch, rotated, _decoding(rotated, True))
            yield _case(
                "decode_sum_encode",
                quantize_kernels.decode_sum_encode_kernel,
                arch,
                plain,
                {"RESIDUAL": None} | _recoding(plain, plain, False),
            )
            yield _case(
                "decode_sum_encode with residual",
                quantize_kernels.decode_sum_encode_kernel,
                arch,
                plain,
                _recoding(plain, plain, False),
            )
        large = Format("int8", 512, 128)
        how = _encoding(large, torch.float32, True, True)
        yield _case("encode by chance with residual", quantize_kernels.encode_kernel, arch, large, how)


def _case(name: str, kernel: Any, arch: str, format: Format, how: dict[str, Any]) -> AotCase:
    constants, options = _launch(arch, 16, format.block, format.rotation)
    constants |= how
    signature = {x: _TYPES[x] for x in kernel.arg_names if x not in constants}
    return AotCase(
        name=f"quantize.{name} {format.bits} block={format.block} rotation={format.rotation}",
        kernel=kernel,
        arch=arch,
        signature=signature,
        constexprs=constants,
        divisible=tuple(x for x, kind in signature.items() if kind.startswith("*")),
        options=options,
        tensor_cores=format.rotation == 64,  # one within pairs has too few rows for those of sm_90 and sm_100
    )
